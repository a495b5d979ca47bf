"""A server from its options to its end: command, child process, log, supervisor."""
