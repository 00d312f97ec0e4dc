"""How threads share out a parallel loop: every part once, whoever is slow."""

from __future__ import annotations

import ctypes
import subprocess

import pytest

from dsc.backends.tvm import library
from dsc.backends.tvm.kernels.cpp import compiler

WORKERS, SHARES = 7, 5
POOL = """
#include <pthread.h>
#include <unistd.h>
static int fails, slow, runs, ended, counts[4096];
static pthread_t who[4096];
static int at(int *count) { return __atomic_load_n(count, __ATOMIC_SEQ_CST); }
static int count(int number, Env *env, void *) {
  who[number] = pthread_self();
  __atomic_fetch_add(&counts[number], 1, __ATOMIC_SEQ_CST);
  __atomic_store_n(&runs, env->tasks, __ATOMIC_SEQ_CST);
  for (int i = 0; number == 0 && slow > 0 && i < 5000 && !at(&counts[slow]); ++i) usleep(1000);
  for (int i = 0; number == slow && i < 5000 && at(&ended) < env->tasks - 1; ++i) usleep(1000);
  __atomic_fetch_add(&ended, 1, __ATOMIC_SEQ_CST);
  return number == fails;
}
struct Run { int number; Part part; void *data; Env env; int failed; };
static void *one(void *given) {
  Run *run = (Run *)given;
  run->failed = run->part(run->number, &run->env, run->data);
  return nullptr;
}
static int workers;
static int pool(Part part, void *data, int) {  // as TVM's: all workers call the part, and all end
  pthread_t started[WORKERS];
  Run run[WORKERS];
  int failed = 0;
  for (int i = 0; i < workers; ++i) run[i] = Run{i, part, data, Env{nullptr, workers}, 0};
  for (int i = 0; i < workers; ++i) pthread_create(&started[i], nullptr, one, &run[i]);
  for (int i = 0; i < workers; ++i) pthread_join(started[i], nullptr), failed |= run[i].failed;
  return failed;
}
extern "C" int loop(int wanted, int fail, int waits) {
  threads = pool, workers = wanted, fails = fail, slow = waits, ended = 0;
  memset(counts, 0, sizeof counts);
  return share(count, nullptr, 0);
}
extern "C" int parts() { return runs; }
extern "C" int alike(int a, int b) { return pthread_equal(who[a], who[b]) != 0; }
extern "C" int times(int number) { return counts[number]; }
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library's text around a pool that starts threads anew."""
    folder = tmp_path_factory.mktemp("loops")
    share = library.SHARE.format(parts=library.PARTS, shares=SHARES)
    text = POOL.replace("WORKERS", str(WORKERS))
    (folder / "loops.cc").write_text("\n".join([library.PRELUDE, share, text]))
    line = [compiler(), *library.FLAGS, "-pthread", "-o", "loops.so", "loops.cc"]
    subprocess.run(line, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "loops.so"))


@pytest.mark.parametrize("workers", range(1, WORKERS + 1))
def test_every_part_is_taken_once(shared: ctypes.CDLL, workers: int) -> None:
    for _ in range(20):
        assert shared.loop(workers, -1, -1) == 0
        parts = shared.parts()
        assert parts == (1 if workers == 1 else library.PARTS * min(workers, SHARES))
        assert [shared.times(i) for i in range(parts + 1)] == [1] * parts + [0]


def test_a_part_that_fails_is_told(shared: ctypes.CDLL) -> None:
    assert shared.loop(3, 5, -1) == 1
    assert shared.loop(3, -1, -1) == 0


def test_others_take_what_a_slow_thread_leaves(shared: ctypes.CDLL) -> None:
    """The second of two threads stays in its first part until all others are done."""
    first = library.PARTS
    assert shared.loop(2, -1, first) == 0
    assert all(shared.alike(0, i) for i in range(1, 2 * first) if i != first)
    assert not shared.alike(0, first)
