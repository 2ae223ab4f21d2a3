"""What a bench measures with: clocks, operations, memory, the machine."""
