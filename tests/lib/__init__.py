"""What the tests share: commands, processes, environments and run directories."""
