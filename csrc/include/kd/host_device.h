// A function that is marked so compiles for host and device.
#pragma once

#ifdef __CUDACC__
#define KD_HOST_DEVICE __host__ __device__
#else
#define KD_HOST_DEVICE
#endif
