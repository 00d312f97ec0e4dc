/* A CUDA driver whose device memory is the host's: what the launcher calls, checked and logged.
 *
 * Kernels do not run. Each launch writes "symbol grid block shared device-pointer" to the file that
 * FAKE_CUDA_LOG names; the last is 1 when the first parameter points into allocated memory, and
 * "dependent" follows where the launch may begin before the former one is done. A graph
 * is the lines of its launches, written when it is replayed. The clock of events runs 2 us a launch,
 * copies at 4 TB/s, and the product that reads the matrix peak, which alone is made, at 1 PFLOP/s. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LIMIT 4096
static struct { uint64_t base; size_t size; } blocks[LIMIT];
static int used, others;
static double clock_ms;

static int spoiled;

/* What is held: memory, and contexts, streams, modules, events and graphs. */
int fake_held(void) { return used + others; }
static int inside(uint64_t at) {
  for (int i = 0; i < used; i++)
    if (at >= blocks[i].base && at < blocks[i].base + blocks[i].size) return 1;
  return 0;
}
int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
  const char *called = getenv("FAKE_CUDA_NAME");
  return snprintf(name, size, "%s %d", called == NULL ? "fake" : called, device) < 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 1u << 30; return device; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 16 ? 132 : 0;
  return device;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
  others++;
  *context = &used;
  return device;
}
int cuCtxSetCurrent(void *context) { return context != &used; }
int cuDevicePrimaryCtxRelease_v2(int device) { others--; return device; }
int cuModuleUnload(void *module) { others--; return module == NULL; }
int cuStreamDestroy_v2(void *stream) { others--; return stream != blocks; }
int cuStreamCreate(void **stream, unsigned flags) {
  others++;
  *stream = blocks;
  return flags != 1;
}
int cuStreamSynchronize(void *stream) {
  spoiled = 0;
  return stream != blocks;
}
int cuMemAlloc_v2(uint64_t *pointer, size_t size) {
  if (used == LIMIT) return 2;
  *pointer = (uint64_t)calloc(1, size);
  blocks[used].base = *pointer;
  blocks[used++].size = size;
  return 0;
}
int cuMemGetInfo_v2(size_t *free, size_t *total) { *free = 1u << 20; *total = 1u << 30; return 0; }
int cuMemFree_v2(uint64_t pointer) {
  for (int i = 0; i < used; i++)
    if (blocks[i].base == pointer) {
      free((void *)pointer);
      blocks[i] = blocks[--used];
      return 0;
    }
  return 1;
}
int cuMemcpyHtoDAsync_v2(uint64_t target, const void *source, size_t size, void *stream) {
  if (!inside(target) || !inside(target + size - 1)) return 1;
  memcpy((void *)target, source, size);
  return stream != blocks;
}
int cuMemcpyDtoHAsync_v2(void *target, uint64_t source, size_t size, void *stream) {
  if (!inside(source) || !inside(source + size - 1)) return 1;
  memcpy(target, (void *)source, size);
  if (spoiled) memset(target, 0x3f, size);
  return stream != blocks;
}
int cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t size, void *stream) {
  if (!inside(source) || !inside(source + size - 1)) return 1;
  clock_ms += 2.0 * size / 4e9;
  return cuMemcpyHtoDAsync_v2(target, (void *)source, size, stream);
}
int cuMemsetD8Async(uint64_t target, unsigned char value, size_t size, void *stream) {
  if (!inside(target) || !inside(target + size - 1)) return 1;
  if (size < 1u << 26) memset((void *)target, value, size); /* what only takes time is not done */
  clock_ms += size / 4e9;
  return stream != blocks;
}
int cuEventCreate(void **event, unsigned flags) {
  others++;
  *event = calloc(1, 8);
  return flags;
}
int cuEventDestroy_v2(void *event) { others--; free(event); return 0; }
int cuEventRecord(void *event, void *stream) {
  *(double *)event = clock_ms;
  return stream != blocks;
}
int cuEventElapsedTime(float *ms, void *start, void *end) {
  *ms = (float)(*(double *)end - *(double *)start);
  return 0;
}
int cuMemcpyHtoD_v2(uint64_t target, const void *source, size_t size) {
  return cuMemcpyHtoDAsync_v2(target, source, size, blocks);
}
int cuMemcpyDtoH_v2(void *target, uint64_t source, size_t size) {
  return cuMemcpyDtoHAsync_v2(target, source, size, blocks);
}
int cuModuleLoadData(void **module, const char *image) {
  if (memcmp(image, "\177ELF", 4)) return 200;
  others++;
  *module = (void *)image;
  return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  char *made = calloc(1, strlen(name) + 256); /* the name, and behind it how the binary begins */
  strcpy(made, name);
  strncpy(made + strlen(name) + 1, (char *)module + 4, 250);
  *function = made;
  return module == NULL;
}
/* What FAKE_CUDA_PLANTED says of a binary: lines "beginning microseconds", and behind them "wrong"
 * where what it computes is to be seen in what is downloaded next, "fails" where it does not start,
 * "ends" where no launch does any more. */
static double planted(const char *function, const char **how) {
  const char *place = getenv("FAKE_CUDA_PLANTED"), *binary = function + strlen(function) + 1;
  char line[256], name[200], word[16];
  double us, found = 2;
  FILE *file = place == NULL ? NULL : fopen(place, "r");
  while (file != NULL && fgets(line, sizeof line, file) != NULL) {
    int read = sscanf(line, "%199s %lf %15s", name, &us, word);
    if (read >= 2 && strncmp(name, binary, strlen(name)) == 0) {
      found = us;
      if (read == 3) *how = strcmp(word, "wrong") == 0 ? " wrong" : strcmp(word, "ends") == 0 ? "!!" : "!";
    }
  }
  if (file != NULL) fclose(file);
  return found;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
  return function == NULL || attribute != 8 || value < 0;
}
int cuGetErrorName(int status, const char **name) { *name = "FAKE_ERROR"; return status == 0; }
static char *captured;
int cuStreamBeginCapture_v2(void *stream, int mode) {
  captured = calloc(1, 1 << 20);
  return stream != blocks || mode != 1;
}
int cuStreamEndCapture(void *stream, void **graph) {
  if (captured == NULL) return 1;
  others++;
  *graph = captured;
  captured = NULL;
  return stream != blocks;
}
int cuGraphInstantiateWithFlags(void **ready, void *graph, unsigned long long flags) {
  others++;
  *ready = strdup(graph);
  return flags != 0;
}
int cuGraphDestroy(void *graph) { others--; free(graph); return 0; }
int cuGraphExecDestroy(void *ready) { others--; free(ready); return 0; }
int cuGraphLaunch(void *ready, void *stream) {
  FILE *log = fopen(getenv("FAKE_CUDA_LOG"), "a");
  if (log == NULL || stream != blocks) return 1;
  for (const char *c = ready; *c; c++) clock_ms += *c == '\n' ? 2e-3 : 0;
  fputs(ready, log);
  if (strstr(ready, " wrong") != NULL) spoiled = 1;
  return fclose(log);
}
static int launched(void *function, const unsigned *sizes, void *stream, void **parameters,
                    void **extra, const char *how) {
  char line[256];
  const unsigned *g = sizes, *b = sizes + 3;
  static int ended;
  double us = planted(function, &how);
  ended |= strcmp(how, "!!") == 0;
  if (ended || *how == '!') return 719;
  if ((stream != blocks && stream != NULL) || extra != NULL || g[0] * g[1] * g[2] == 0) return 1;
  snprintf(line, sizeof line, "%s %u %u %u %u %u %u %d%s\n", (char *)function, g[0], g[1], g[2],
           b[0] * b[1] * b[2], b[1], sizes[6], inside(*(uint64_t *)parameters[0]), how);
  if (captured != NULL) return strcat(captured, line) == NULL;
  if (strcmp(function, "multiply") == 0) {
    int turns = *(int *)parameters[2];
    float *out = *(float **)parameters[1];
    for (unsigned i = 0; i < g[0]; i++) out[i] = turns * 64.0f;
    clock_ms += 2.0 * 128 * 128 * 64 * turns * g[0] / 1e12;
    return 0;
  }
  clock_ms += us / 1e3;
  if (strcmp(how, " wrong") == 0) spoiled = 1;
  FILE *log = fopen(getenv("FAKE_CUDA_LOG"), "a");
  if (log == NULL) return 1;
  fputs(line, log);
  return fclose(log);
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **parameters, void **extra) {
  const unsigned sizes[] = {gx, gy, gz, bx, by, bz, shared};
  return launched(function, sizes, stream, parameters, extra, "");
}
struct attribute { int id, pad; union { char bytes[64]; int allowed; } value; };
struct config { unsigned sizes[7]; void *stream; struct attribute *attributes; unsigned count; };
int cuLaunchKernelEx(const struct config *config, void *function, void **parameters, void **extra) {
  const struct attribute *only = config->attributes;
  if (config->count != 1 || only->id != 6 || only->value.allowed != 1) return 1;
  return launched(function, config->sizes, config->stream, parameters, extra, " dependent");
}
