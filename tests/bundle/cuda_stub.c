/* CUDA's runtime without a GPU: memory is the host's, and what was made is counted until it is destroyed. */
#include <stdlib.h>
#include <string.h>

#ifndef REFUSED
#define REFUSED 0 /* what the first call gives; 35 is cudaErrorInsufficientDriver */
#endif

static int count;
int alive(void) { return count; }

static int made(void **handle) { count++; *handle = malloc(1); return 0; }
static int destroyed(void *handle) { count--; free(handle); return 0; }

const char *cudaGetErrorString(int code) { return code == 35 ? "driver version is insufficient" : "other"; }
int cudaGetDeviceCount(int *devices) { *devices = 1; return REFUSED; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaMalloc(void **pointer, size_t size) { count++; *pointer = malloc(size); return 0; }
int cudaFree(void *pointer) { return destroyed(pointer); }
int cudaHostAlloc(void **pointer, size_t size, unsigned flags) { return cudaMalloc(pointer, size); }
int cudaFreeHost(void *pointer) { return destroyed(pointer); }
int cudaMemcpyAsync(void *target, void *source, size_t size, int kind, void *stream)
{ memcpy(target, source, size); return 0; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return made(stream); }
int cudaStreamDestroy(void *stream) { return destroyed(stream); }
int cudaStreamSynchronize(void *stream) { return 0; }
int cudaEventCreate(void **event) { return made(event); }
int cudaEventDestroy(void *event) { return destroyed(event); }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventElapsedTime(float *milliseconds, void *begin, void *end) { *milliseconds = 0.5f; return 0; }
int cudaStreamBeginCapture(void *stream, int mode) { return 0; }
int cudaStreamEndCapture(void *stream, void **graph) { return made(graph); }
int cudaGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags)
{ return made(executable); }
int cudaGraphLaunch(void *executable, void *stream) { return 0; }
int cudaGraphExecDestroy(void *executable) { return destroyed(executable); }
int cudaGraphDestroy(void *graph) { return destroyed(graph); }
