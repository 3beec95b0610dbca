"""The common ground of CUDA ops: compiling and launching, the device, operands, parameter structs, launch plans."""
