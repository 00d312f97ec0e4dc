// What this processor can do at most: loops that read memory, and loops that multiply in registers.
//
// Each loop counts by its results, so that none can claim more than it did: memory that is read holds
// ones and the loop gives their sum; factors are ones, and sums of products count the products.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Run `work(i)` for each of some threads, this one among them.
template <typename Work>
void on_threads(int threads, const Work &work) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread &each : others) each.join();
}

// Threads that wait here leave together.
struct Gate {
  const int threads;
  std::atomic<int> here{0};
  void pass() {
    here.fetch_add(1);
    while (here.load(std::memory_order_relaxed) < threads) std::this_thread::yield();
  }
};

// --- reading ---------------------------------------------------------------------------------------

typedef uint64_t Line __attribute__((vector_size(64)));
constexpr long CHUNK = 2048;  // lines that a thread takes at a time

// So many streams side by side, each asking for what it will read so many lines later.
template <int STREAMS, int AHEAD, int KEPT>
uint64_t read_lines(const Line *at, long count) {
  const long each = count / STREAMS;
  Line sums[STREAMS] = {};
#pragma GCC unroll 4
  for (long i = 0; i < each; ++i) {
#pragma GCC unroll 8
    for (int s = 0; s < STREAMS; ++s) {
      const Line *line = at + s * each + i;
      if (AHEAD) __builtin_prefetch(line + AHEAD, 0, KEPT);
      sums[s] += *line;
    }
  }
  Line all = {};
  for (int s = 0; s < STREAMS; ++s) all += sums[s];
  uint64_t sum = 0;
  for (int i = 0; i < 8; ++i) sum += all[i];
  return sum;
}

// The C library's search, for a byte that filled memory does not hold: it has to look at all.
uint64_t search_lines(const Line *at, long count) {
  return memchr(at, 2, count * sizeof(Line)) ? 0 : 8 * count;
}

struct Form {
  const char *name;
  uint64_t (*read)(const Line *, long);
};
constexpr int CACHED = 3, PASSING = 0;  // what a prefetch says of a line: keep it, or let it go
const Form FORMS[] = {
    {"search", search_lines},
    {"1 stream", read_lines<1, 0, 0>},
    {"2 streams", read_lines<2, 0, 0>},
    {"4 streams", read_lines<4, 0, 0>},
    {"8 streams", read_lines<8, 0, 0>},
    {"1 stream, prefetched", read_lines<1, 64, CACHED>},
    {"4 streams, prefetched", read_lines<4, 16, CACHED>},
    {"1 stream, prefetched past the caches", read_lines<1, 64, PASSING>},
    {"4 streams, prefetched past the caches", read_lines<4, 16, PASSING>},
};

// --- multiplying -----------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int BYTES = 64, SUMS = 24;
#elif defined(__AVX__)
constexpr int BYTES = 32, SUMS = 12;
#else
constexpr int BYTES = 16, SUMS = 24;
#endif
typedef float Floats __attribute__((vector_size(BYTES)));
typedef int32_t Words __attribute__((vector_size(BYTES)));
typedef signed char Bytes __attribute__((vector_size(BYTES)));
typedef uint16_t Halves __attribute__((vector_size(BYTES)));
constexpr uint16_t ONE = 0x3F80;  // in bf16

// A value that the compiler knows nothing of.
template <typename T>
T unknown(T x) {
  volatile T hidden = x;
  return hidden;
}

template <typename Vector, typename Number>
Vector filled(Number x) {
  Vector found;
  for (unsigned i = 0; i < sizeof(Vector) / sizeof(x); ++i) found[i] = unknown(x);
  return found;
}

// Multiplications and additions of `count` steps, of which each adds products to all sums.
template <typename Vector, typename Step>
double counted(long count, const Step &step) {
  using Element = std::remove_reference_t<decltype(std::declval<Vector &>()[0])>;
  Vector sums[SUMS];
  for (Vector &each : sums) each = filled<Vector>(Element(0));
  for (long i = 0; i < count; ++i) {
#pragma GCC unroll 24
    for (int s = 0; s < SUMS; ++s) sums[s] = step(sums[s]);
  }
  double found = 0;
  for (const Vector &each : sums)
    for (unsigned i = 0; i < BYTES / 4; ++i) found += each[i];
  return found;
}

double multiply_fp32(long count) {
  const Floats x = filled<Floats>(1.0f), y = filled<Floats>(1.0f);
  return counted<Floats>(count, [&](Floats sum) { return sum * x + y; });
}

#if defined(__AVX512BF16__)
double multiply_bf16(long count) {
  const __m512bh x = (__m512bh)filled<Halves>(ONE), y = (__m512bh)filled<Halves>(ONE);
  return counted<Floats>(
      count, [&](Floats sum) { return (Floats)_mm512_dpbf16_ps((__m512)sum, x, y); });
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
double multiply_bf16(long count) {
  const bfloat16x8_t x = (bfloat16x8_t)filled<Halves>(ONE), y = (bfloat16x8_t)filled<Halves>(ONE);
  return counted<Floats>(
      count, [&](Floats sum) { return (Floats)vbfmmlaq_f32((float32x4_t)sum, x, y); });
}
#endif

#if defined(__AVX512VNNI__)
double multiply_int8(long count) {
  const __m512i x = (__m512i)filled<Bytes>((signed char)1), y = (__m512i)filled<Bytes>((signed char)1);
  return counted<Words>(
      count, [&](Words sum) { return (Words)_mm512_dpbusd_epi32((__m512i)sum, x, y); });
}
#elif defined(__AVXVNNI__)
double multiply_int8(long count) {
  const __m256i x = (__m256i)filled<Bytes>((signed char)1), y = (__m256i)filled<Bytes>((signed char)1);
  return counted<Words>(
      count, [&](Words sum) { return (Words)_mm256_dpbusd_avx_epi32((__m256i)sum, x, y); });
}
#elif defined(__AVX512BW__) || defined(__AVX2__)
double multiply_int8(long count) {
  const Bytes ones = filled<Bytes>((signed char)1);
  const Halves words = filled<Halves>((uint16_t)1);
  return counted<Words>(count, [&](Words sum) {
    Bytes x = ones;
    asm volatile("" : "+x"(x));  // else one product would serve all sums
#if defined(__AVX512BW__)
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)x, (__m512i)ones);
    return sum + (Words)_mm512_madd_epi16(pairs, (__m512i)words);
#else
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)x, (__m256i)ones);
    return sum + (Words)_mm256_madd_epi16(pairs, (__m256i)words);
#endif
  });
}
#elif defined(__ARM_FEATURE_MATMUL_INT8)
double multiply_int8(long count) {
  const int8x16_t x = (int8x16_t)filled<Bytes>((signed char)1), y = x;
  return counted<Words>(
      count, [&](Words sum) { return (Words)vmmlaq_s32((int32x4_t)sum, x, y); });
}
#elif defined(__ARM_FEATURE_DOTPROD)
double multiply_int8(long count) {
  const int8x16_t x = (int8x16_t)filled<Bytes>((signed char)1), y = x;
  return counted<Words>(
      count, [&](Words sum) { return (Words)vdotq_s32((int32x4_t)sum, x, y); });
}
#endif

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define TILES 1
constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // asm/prctl.h

// Two by two products of tiles of 16 rows, each of 64 bytes of ones.
template <typename Number, typename Sum, typename Step>
double counted_in_tiles(long count, Number one, const Step &step) {
  if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA)) return 0;
  struct alignas(64) Config {
    uint8_t palette = 1, unused[15] = {};
    uint16_t width[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  alignas(64) Number ones[1024 / sizeof(Number)];
  alignas(64) Sum sums[256];
  for (Number &each : ones) each = unknown(one);
  _tile_loadconfig(&config);
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones, 64);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long i = 0; i < count; ++i) step();
  double found = 0;
#define ADD(tile)                \
  _tile_stored(tile, sums, 64); \
  for (Sum each : sums) found += each;
  ADD(0) ADD(1) ADD(2) ADD(3)
#undef ADD
  _tile_release();
  return found;
}

double multiply_bf16_tiles(long count) {
  return counted_in_tiles<uint16_t, float>(count, ONE, [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  });
}

double multiply_int8_tiles(long count) {
  return counted_in_tiles<int8_t, int32_t>(count, 1, [] {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  });
}
#endif

struct Product {
  const char *name;
  double (*multiply)(long);
};
const Product PRODUCTS[] = {
    {"fp32 vectors", multiply_fp32},
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    {"bf16 vectors", multiply_bf16},
#endif
#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD) || defined(__ARM_FEATURE_MATMUL_INT8)
    {"int8 vectors", multiply_int8},
#endif
#if defined(TILES)
    {"bf16 tiles", multiply_bf16_tiles},
    {"int8 tiles", multiply_int8_tiles},
#endif
};
constexpr long STEPS = 1000;  // few enough that fp32 counts their products exactly

}  // namespace

// The names of what there is, by number, or none beyond the last.
extern "C" const char *dsc_form(int number) {
  return number < int(sizeof(FORMS) / sizeof(*FORMS)) ? FORMS[number].name : nullptr;
}

extern "C" const char *dsc_product(int number) {
  return number < int(sizeof(PRODUCTS) / sizeof(*PRODUCTS)) ? PRODUCTS[number].name : nullptr;
}

// Fill memory with ones, each thread the part that it will read.
extern "C" void dsc_fill(uint64_t *base, long lines, int threads) {
  on_threads(threads, [=](int me) {
    const long part = 8 * (lines / threads);
    std::fill_n(base + me * part, me == threads - 1 ? 8 * lines - me * part : part, 1);
  });
}

// Seconds of so many passes over memory. A thread reads its own part, then helps with the others'.
extern "C" double dsc_read(int form, const uint64_t *base, long lines, int threads, long passes,
                           uint64_t *sum) {
  struct alignas(64) Part {
    std::atomic<long> taken{0};
    uint64_t sum = 0;
    double start = 0, end = 0;
  };
  std::vector<Part> parts(threads);
  Gate gate{threads};
  const long part = lines / threads, chunks = (part + CHUNK - 1) / CHUNK;
  on_threads(threads, [&](int me) {
    gate.pass();
    parts[me].start = now();
    uint64_t found = 0;
    for (int i = 0; i < threads; ++i) {
      const int whose = (me + i) % threads;
      const Line *at = (const Line *)base + whose * part;
      for (long n; (n = parts[whose].taken.fetch_add(1)) < chunks * passes;) {
        const long first = n % chunks * CHUNK;
        found += FORMS[form].read(at + first, std::min(CHUNK, part - first));
      }
    }
    parts[me].sum = found;
    parts[me].end = now();
  });
  *sum = 0;
  double start = parts[0].start, end = parts[0].end;
  for (const Part &each : parts) {
    *sum += each.sum;
    start = std::min(start, each.start);
    end = std::max(end, each.end);
  }
  return end - start;
}

// Floating-point operations a second of all threads, each multiplying for so many seconds; 0 where
// the operating system does not let this process.
extern "C" double dsc_multiply(int product, int threads, double seconds) {
  std::vector<double> speeds(threads);
  Gate gate{threads};
  on_threads(threads, [&](int me) {
    gate.pass();
    const double start = now();
    double products = 0, taken = 0;
    do {
      const double found = PRODUCTS[product].multiply(STEPS);
      if (!found) break;
      products += found;
      taken = now() - start;
    } while (taken < seconds);
    speeds[me] = taken ? 2 * products / taken : 0;
  });
  double all = 0;
  for (double each : speeds) all += each;
  return all;
}
