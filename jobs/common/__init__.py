"""What every command and package stands on: the command line, progress, locks."""
