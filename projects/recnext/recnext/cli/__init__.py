"""The command line ``recnext``, and behind each file of ``tools/`` one of its commands."""
