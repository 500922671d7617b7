"""What a configuration means on a given number of ranks, told without starting one."""
