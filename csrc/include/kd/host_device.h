// A function that is marked so compiles for host and device.
#pragma once

#ifdef __CUDACC__
#define KD_HOST_DEVICE __host__ __device__
#else
#define KD_HOST_DEVICE
#endif

#define KD_FORCE_INLINE inline __attribute__((always_inline))

// The instruction set that a source is compiled for names the namespace of its code, so that the linker never takes code
// for one processor into a function for another. What passes between them is plain data, outside of these namespaces.
#ifndef KD_ISA
#define KD_ISA baseline
#endif

// Before a loop of a few steps that is to be unrolled whole.
#ifdef __CUDA_ARCH__
#define KD_UNROLL _Pragma("unroll")
#else
#define KD_UNROLL _Pragma("GCC unroll 16")
#endif
