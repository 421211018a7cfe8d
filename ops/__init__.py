"""What people run: the `reeld` command."""
