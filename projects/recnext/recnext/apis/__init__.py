"""What the command lines call: one function each, with the options as arguments."""
