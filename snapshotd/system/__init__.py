"""What is asked of the machine: system calls, mounts, processes, memory."""
