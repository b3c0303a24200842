"""Answers over HTTP: routes and limits without a network, the command as a program, and its page in a browser."""
