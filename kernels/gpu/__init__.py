"""What every CUDA op needs: compiling and launching, the device, operands, parameter structs, launch plans."""
