/* A stand-in for libcuda.so.1, the CUDA driver: every call succeeds and does nothing. */
#define IGNORED(name) int name(void) { return 0; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return 0;
}
IGNORED(cuCtxGetCurrent) IGNORED(cuCtxSetCurrent) IGNORED(cuDeviceGet)
IGNORED(cuDeviceGetAttribute) IGNORED(cuDevicePrimaryCtxRetain) IGNORED(cuFileBufDeregister)
IGNORED(cuFileBufRegister) IGNORED(cuFileHandleDeregister) IGNORED(cuFileHandleRegister)
IGNORED(cuFileRead) IGNORED(cuFileWrite) IGNORED(cuFuncGetAttribute) IGNORED(cuFuncSetAttribute)
IGNORED(cuFuncSetCacheConfig) IGNORED(cuGetErrorString) IGNORED(cuLaunchCooperativeKernel)
IGNORED(cuLaunchKernel) IGNORED(cuLinkAddData_v2) IGNORED(cuLinkComplete)
IGNORED(cuLinkCreate_v2) IGNORED(cuModuleGetFunction) IGNORED(cuModuleLoad)
IGNORED(cuModuleLoadData) IGNORED(cuModuleLoadDataEx) IGNORED(cuModuleUnload)
IGNORED(cuOccupancyMaxActiveBlocksPerMultiprocessor) IGNORED(cuPointerGetAttribute)
IGNORED(cuTensorMapEncodeTiled)
