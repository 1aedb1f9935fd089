// A stranger on the GPU: each block takes all the shared memory of an SM for a while, and ends.

extern "C" __global__ void __launch_bounds__(64) hog(volatile unsigned* there, unsigned long long ns) {
    extern __shared__ unsigned char taken[];
    taken[threadIdx.x] = 0;
    if (threadIdx.x == 0) there[blockIdx.x] = 1;  // page-locked: the host knows that it runs
    const unsigned long long most = 200000000;  // whatever was asked for
    unsigned long long begun, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begun));
    do {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - begun < (ns < most ? ns : most));
}
