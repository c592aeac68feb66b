// A function that is marked so compiles for host and device.
#pragma once

#ifdef __CUDACC__
#define KD_HOST_DEVICE __host__ __device__
#else
#define KD_HOST_DEVICE
#endif

// Before a loop of a few steps that is to be unrolled whole.
#ifdef __CUDA_ARCH__
#define KD_UNROLL _Pragma("unroll")
#else
#define KD_UNROLL _Pragma("GCC unroll 8")
#endif
