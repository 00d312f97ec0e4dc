/* Runs entries of a library of the tvm backend for a CPU that an emulator stands in for.
 *
 * Arguments: the library, and into how many tasks a parallel loop is cut; they run one by one.
 * Standard input holds calls: the entry's name in 64 bytes, the number of values, and for each
 * value its kind, its number or the bytes that it points to, and where these are given them too;
 * or the number of a value before it that it is the same as.
 * The last value is the list of steps. Standard output gets of each call what the entry returns,
 * then the bytes of its results in order. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NUMBER, GIVEN, RESULT, SAME };
typedef struct { void *sync; int32_t tasks; } Group;
typedef int (*Task)(int task, Group *group, void *data);
typedef struct { int32_t kind; uint32_t unused; int64_t value; } Any;
typedef int (*Entry)(void *, const Any *, int, Any *);
static int tasks;

static int launch(Task task, void *data, int wanted) {
  Group group = {NULL, wanted > 0 ? wanted : tasks};
  for (int i = 0; i < group.tasks; i++)
    if (task(i, &group, data)) return -1;
  return 0;
}

static void *allocate(int kind, int device, uint64_t bytes, int code, int bits) {
  return aligned_alloc(64, (bytes + 127) / 64 * 64);
}
static int release(int kind, int device, void *memory) { return free(memory), 0; }

static void set(void *library, const char *name, void *function) {
  void **slot = dlsym(library, name);
  if (slot) *slot = function;
}

static int take(void *at, size_t size) { return fread(at, 1, size, stdin) == size; }

int main(int count, char **given) {
  void *library = dlopen(given[1], RTLD_NOW);
  if (count != 3 || !library) return fprintf(stderr, "%s\n", dlerror()), 1;
  tasks = atoi(given[2]);
  set(library, "__TVMBackendParallelLaunch", (void *)launch);
  set(library, "__TVMBackendAllocWorkspace", (void *)allocate);
  set(library, "__TVMBackendFreeWorkspace", (void *)release);
  char name[64], symbol[96];
  while (take(name, sizeof name)) {
    int64_t n, head[2];
    if (!take(&n, 8)) return 2;
    int64_t *values = calloc(n, 8), *sizes = calloc(n, 8);
    for (int64_t i = 0; i < n; i++) {
      if (!take(head, 16)) return 2;
      values[i] = head[1];
      if (head[0] == SAME) values[i] = values[head[1]];
      if (head[0] == NUMBER || head[0] == SAME) continue;
      void *memory = aligned_alloc(64, (head[1] + 127) / 64 * 64);
      memset(memory, 0xff, head[1]);
      if (head[0] == GIVEN && !take(memory, head[1])) return 2;
      sizes[i] = head[0] == RESULT ? head[1] : 0;
      values[i] = (int64_t)memory;
    }
    snprintf(symbol, sizeof symbol, "__tvm_ffi_%.64s", name);
    Entry entry = (Entry)dlsym(library, symbol);
    if (!entry) return fprintf(stderr, "no %s\n", symbol), 3;
    Any arguments[2] = {{1, 0, (int64_t)values}, {1, 0, values[n - 1]}}, result = {0, 0, 0};
    entry(NULL, arguments, 2, &result);
    fwrite(&result.value, 8, 1, stdout);
    for (int64_t i = 0; i < n; i++)
      if (sizes[i]) fwrite((void *)values[i], 1, sizes[i], stdout);
  }
  return 0;
}
