// Compiles the kernel of bn_affine, see ../launches.h.

#include "bn_affine.cuh"
