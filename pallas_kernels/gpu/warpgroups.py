"""Registers of the warpgroups of a thread block that has two computing ones and one that copies."""

# A multiprocessor has 65536 registers: 512 for each lane of three warpgroups together, 168 each at the start.
COMPUTING_REGISTERS = 240
COPYING_REGISTERS = 24
