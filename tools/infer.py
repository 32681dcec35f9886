"""Predict images, folders and videos: label maps, areas of the classes, and pictures with a legend."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('predict')
