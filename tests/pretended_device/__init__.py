"""A CUDA device that is not there: the program and DeepSpeed take their CUDA branches on a CPU, and
what a real device would refuse, race or wait for is recorded."""
