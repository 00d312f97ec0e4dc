/* A HIP run time in the manner of fake_cuda.c: the same checks and the same log, by HIP's names. */
#define cuEventCreate hipEventCreateWithFlags
#define cuEventDestroy_v2 hipEventDestroy
#define cuEventElapsedTime hipEventElapsedTime
#define cuEventRecord hipEventRecord
#define cuGraphDestroy hipGraphDestroy
#define cuGraphExecDestroy hipGraphExecDestroy
#define cuGraphInstantiateWithFlags hipGraphInstantiateWithFlags
#define cuGraphLaunch hipGraphLaunch
#define cuLaunchKernel hipModuleLaunchKernel
#define cuMemAlloc_v2 hipMalloc
#define cuMemFree_v2 hipFree
#define cuMemcpyDtoDAsync_v2 hipMemcpyDtoDAsync
#define cuMemcpyDtoHAsync_v2 hipMemcpyDtoHAsync
#define cuMemcpyHtoDAsync_v2 hipMemcpyHtoDAsync
#define cuMemsetD8Async hipMemsetD8Async
#define cuMemGetInfo_v2 hipMemGetInfo
#define cuModuleGetFunction hipModuleGetFunction
#define cuModuleLoadData hipModuleLoadData
#define cuModuleUnload hipModuleUnload
#define cuStreamBeginCapture_v2 hipStreamBeginCapture
#define cuStreamCreate hipStreamCreateWithFlags
#define cuStreamDestroy_v2 hipStreamDestroy
#define cuStreamEndCapture hipStreamEndCapture
#define cuStreamSynchronize hipStreamSynchronize
#include "fake_cuda.c"
int hipInit(unsigned flags) { return flags; }
int hipGetDeviceCount(int *count) { *count = 1; return 0; }
int hipSetDevice(int device) { return device; }
int hipCtxSetCurrent(void *context) { return context == NULL; }
int hipFuncSetAttribute(void *function, int attribute, int value) {
  return function == NULL || attribute < 0 || value < 0;
}
int hipGetDevicePropertiesR0600(char *told, int device) {
  strcpy(told + 1160, "gfx942:sramecc+:xnack-");
  return device;
}
const char *hipGetErrorName(int status) { return status ? "hipErrorFake" : "hipSuccess"; }
