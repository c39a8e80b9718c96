// The convolutions of convolution.cc for bfloat16 arrays, by the matrix unit AMX of x86 processors.
//
// AMX multiplies tiles: 16 × 32 numbers by 32 × 16, whose rows lie in pairs, and adds the products to 16 × 16 sums in
// float32. Results are rounded to bfloat16 once. Like AMX itself, these functions take subnormal numbers for zero.
//
// Values and the gradient of the input: the rows of an image, with zeros beside them, are channels last, so that what a
// row of taps reads for one output is contiguous, and what it reads for the next begins one step further. A tile of
// inputs is therefore loaded from the image itself. It may reach beyond its taps, where the kernel's tile has zeros; an
// infinity or NaN there makes NaN of outputs beside those that it belongs to.
//
// The gradient of the kernel sums over positions, so x is transposed to (channel, position), one array for each phase
// of the stride, and a tap is an offset into it. Rows of positions have the length of x's, and y has zeros in between.
//
// Work is cut into the same pieces whatever the number of threads, so results do not depend on it.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "convolution.h"

namespace {

using Half = uint16_t;  // the bits of a bfloat16

constexpr Int kRows = 16, kDepth = 32, kColumns = 16;  // of a tile: of the sums, of what is summed over, of the sums
constexpr Int kTile = kDepth * kColumns;               // numbers of a kernel's tile
constexpr Int kSums = kRows * kColumns;
constexpr Int kBand = 1 << 17;     // numbers of a band of rows: they should stay in the second-level cache
constexpr Int kStrip = 1 << 16;    // numbers that a kernel's gradient goes through at once
constexpr Int kParts = 16;         // pieces of a kernel's gradient
constexpr Int kPartial = 1 << 22;  // floats of the sums of these pieces, before they are added

// Numbers whose first begins a cache line, with two cache lines beyond the last.
template <typename T>
class Buffer {
 public:
  T* Grow(Int size) {
    const size_t bytes = size * sizeof(T) + 192;
    if (bytes > memory_.size()) memory_.resize(bytes);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) & ~uintptr_t{63});
  }

 private:
  std::vector<char> memory_;
};

// Memory of this thread, whatever is in it; one for each number.
template <int number, typename T>
T* Scratch(Int size) {
  static thread_local Buffer<T> memory;
  return memory.Grow(size);
}

// --- tiles ---

// Sums are in tiles 0 to 3, inputs in 4 and 5, kernels in 6 and 7. The operating system must have granted their use.
class Tiles {
 public:
  explicit Tiles(Int rows) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int t = 0; t < 8; ++t) shape.bytes[t] = 64, shape.rows[t] = t < 6 ? rows : kDepth / 2;
    asm volatile("ldtilecfg %0" ::"m"(shape) : "memory");
  }
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
  Tiles(const Tiles&) = delete;
};

template <int T>
inline void Load(const void* from, Int bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(T) : "memory");
}

template <int T>
inline void Store(void* to) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(Int{64}), "i"(T) : "memory");
}

template <int T>
inline void Zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T) : "memory");
}

template <int T, int A, int B>
inline void MultiplyAdd() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(T), "i"(A), "i"(B) : "memory");
}

// M tiles of inputs times N tiles of the kernel, summed over `steps` of 32; sums[m · N + n] are what they are added to
// (`add`), and the results. M · N is at most 4, N at most 2.
template <int M, int N, bool add>
void Multiply(const Half* const* a, Int a_bytes, const Int* offsets, Int steps, const Half* b, Int b_next, float* const* sums) {
  if constexpr (!add) {
    Zero<0>();
    if constexpr (M * N > 1) Zero<1>();
    if constexpr (M * N > 2) Zero<2>();
    if constexpr (M * N > 3) Zero<3>();
  } else {
    Load<0>(sums[0], 64);
    if constexpr (M * N > 1) Load<1>(sums[1], 64);
    if constexpr (M * N > 2) Load<2>(sums[2], 64);
    if constexpr (M * N > 3) Load<3>(sums[3], 64);
  }
  for (Int s = 0; s < steps; ++s, b += kTile) {
    const Int at = offsets[s];
    Load<6>(b, 64);
    if constexpr (N > 1) Load<7>(b + b_next, 64);
    Load<4>(a[0] + at, a_bytes);
    MultiplyAdd<0, 4, 6>();
    if constexpr (N > 1) MultiplyAdd<1, 4, 7>();
    if constexpr (M > 1) {
      Load<5>(a[1] + at, a_bytes);
      MultiplyAdd<N, 5, 6>();
      if constexpr (N > 1) MultiplyAdd<3, 5, 7>();
    }
    if constexpr (M > 2) {
      Load<4>(a[2] + at, a_bytes);
      MultiplyAdd<2, 4, 6>();
    }
    if constexpr (M > 3) {
      Load<5>(a[3] + at, a_bytes);
      MultiplyAdd<3, 5, 6>();
    }
  }
  Store<0>(sums[0]);
  if constexpr (M * N > 1) Store<1>(sums[1]);
  if constexpr (M * N > 2) Store<2>(sums[2]);
  if constexpr (M * N > 3) Store<3>(sums[3]);
}

using MultiplyFunction = decltype(&Multiply<1, 1, false>);

template <bool add>
MultiplyFunction MultiplyOf(Int m, Int n) {
  static constexpr MultiplyFunction one[] = {Multiply<1, 1, add>, Multiply<2, 1, add>, Multiply<3, 1, add>,
                                             Multiply<4, 1, add>};
  static constexpr MultiplyFunction two[] = {Multiply<1, 2, add>, Multiply<2, 2, add>};
  return n == 1 ? one[m - 1] : two[m - 1];
}

// --- forward, and the gradient of the input ---

// Taps that read neighbouring columns of one row, in this order.
struct TapRun {
  Int row, column;
  std::vector<Int> kernels;
};

std::vector<TapRun> RunsOf(const Phase& phase) {
  std::vector<Tap> taps = phase.taps;
  std::sort(taps.begin(), taps.end(), [](const Tap& a, const Tap& b) {
    return a.row != b.row ? a.row < b.row : a.column < b.column;
  });
  std::vector<TapRun> runs;
  for (const Tap& tap : taps) {
    if (runs.empty() || runs.back().row != tap.row ||
        runs.back().column + static_cast<Int>(runs.back().kernels.size()) != tap.column)
      runs.push_back({tap.row, tap.column, {}});
    runs.back().kernels.push_back(tap.kernel);
  }
  return runs;
}

// The kernel of a phase as tiles, (block of outputs, step, 16 pairs, 16 outputs, 2), and what each step reads.
struct Packed {
  Int steps = 0;
  std::vector<Int> offsets;
  Buffer<Half> memory;
  Half* tiles = nullptr;
};

void Pack(const Plan& plan, const Phase& phase, const Half* w, Int low_h, Int low_w, Int line, Packed* packed) {
  const std::vector<TapRun> runs = RunsOf(phase);
  const Int blocks = Ceil(plan.out_channels, kColumns);
  for (const TapRun& run : runs) {
    const Int depth = run.kernels.size() * plan.channels, at = (run.row - low_h) * line + (run.column - low_w) * plan.channels;
    for (Int d = 0; d < depth; d += kDepth) packed->offsets.push_back(at + d);
  }
  packed->steps = packed->offsets.size();
  packed->tiles = packed->memory.Grow(blocks * packed->steps * kTile);
  std::memset(packed->tiles, 0, sizeof(Half) * blocks * packed->steps * kTile);
  for (Int block = 0; block < blocks; ++block) {
    const Int outputs = std::min(kColumns, plan.out_channels - block * kColumns);
    Half* to = packed->tiles + block * packed->steps * kTile;
    for (const TapRun& run : runs) {
      Int depth = 0;
      for (Int kernel : run.kernels)
        for (Int c = 0; c < plan.channels; ++c, ++depth) {
          const Half* from = w + kernel * plan.kernel_tap + c * plan.kernel_input + block * kColumns * plan.kernel_output;
          Half* pair = to + depth / kDepth * kTile + depth % kDepth / 2 * (2 * kColumns) + depth % 2;
          for (Int o = 0; o < outputs; ++o) pair[2 * o] = from[o * plan.kernel_output];
        }
      to += Ceil(depth, kDepth) * kTile;
    }
  }
}

// Rounds `rows` rows of N tiles of sums to bfloat16; a row has `lanes` of them, and the next begins `step` further.
template <int N>
void Round(const float* sums, Int rows, Int lanes, Half* y, Int step) {
  const __mmask32 mask = lanes == 32 ? ~0u : (1u << lanes) - 1;
  for (Int r = 0; r < rows; ++r, sums += kColumns, y += step)
    if constexpr (N == 1) {
      const __m256i v = (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(sums));
      _mm256_mask_storeu_epi16(y, static_cast<__mmask16>(mask), v);
    } else {
      const __m512i v = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(sums + kSums), _mm512_load_ps(sums));
      _mm512_mask_storeu_epi16(y, mask, v);
    }
}

// A row of an image, `columns` numbers of pixels from `low` on, with zeros beside the image.
void ReadRow(const Half* image, Int height, Int width, Int channels, Int row, Int low, Int step, Int columns, Half* to) {
  const Int begin = std::min(columns, low < 0 ? Ceil(-low, step) : 0);
  const Int end = std::max(begin, std::min(columns, width > low ? Ceil(width - low, step) : 0));
  if (row < 0 || row >= height || begin == end) {
    std::memset(to, 0, sizeof(Half) * columns * channels);
    return;
  }
  const Half* from = image + (row * width + low + begin * step) * channels;
  std::memset(to, 0, sizeof(Half) * begin * channels);
  if (step == 1)
    std::memcpy(to + begin * channels, from, sizeof(Half) * (end - begin) * channels);
  else
    for (Int j = 0; j < end - begin; ++j)
      std::memcpy(to + (begin + j) * channels, from + j * step * channels, sizeof(Half) * channels);
  std::memset(to + end * channels, 0, sizeof(Half) * (columns - end) * channels);
}

void Correlate(ffi::ThreadPool& pool, const Plan& plan, const Half* x, const Half* w, Half* y) {
  const Reach reach = ReachOf(plan);
  const Int per_row = Ceil(reach.columns, kRows), wide = Ceil(reach.columns, per_row);  // tiles of a row; their outputs
  const Int columns = (per_row * wide - 1) * plan.step_w + reach.high_w - reach.low_w + 1, line = columns * plan.channels;
  const Int span = reach.high_h - reach.low_h + 1;
  const Int fit = std::max<Int>(1, (kBand / line - span) / plan.step_h + 1);
  const Int bands = Ceil(reach.rows, std::min(fit, reach.rows)), band = Ceil(reach.rows, bands);
  const Int blocks = Ceil(plan.out_channels, kColumns), a_bytes = plan.step_w * plan.channels * sizeof(Half);

  std::vector<Packed> packed(plan.phases.size());
  for (size_t p = 0; p < packed.size(); ++p) Pack(plan, plan.phases[p], w, reach.low_h, reach.low_w, line, &packed[p]);

  Parallel(pool, plan.images * bands, [&](Int job) {
    const Int image = job / bands, first = job % bands * band, end = std::min(first + band, reach.rows);
    if (end <= first) return;
    const Int needed = (end - first - 1) * plan.step_h + span;
    Half* z = Scratch<0, Half>(needed * line + kDepth);
    for (Int r = 0; r < needed; ++r)
      ReadRow(x + image * plan.height * plan.width * plan.channels, plan.height, plan.width, plan.channels,
              first * plan.step_h + reach.low_h + r, reach.low_w, 1, columns, z + r * line);
    std::memset(z + needed * line, 0, sizeof(Half) * kDepth);
    float* sums = Scratch<1, float>(4 * kSums);
    float* const places[] = {sums, sums + kSums, sums + 2 * kSums, sums + 3 * kSums};
    const Tiles tiles(wide);
    for (size_t p = 0; p < packed.size(); ++p) {
      const Phase& phase = plan.phases[p];
      const Int rows = std::min(end, phase.rows) - first, in_row = Ceil(phase.columns, wide), steps = packed[p].steps;
      for (Int block = 0; block < blocks; block += 2) {
        const Int n = std::min<Int>(2, blocks - block), at_once = 4 / n;
        const Int lanes = std::min(n * kColumns, plan.out_channels - block * kColumns);
        for (Int t = 0; t < rows * in_row; t += at_once) {
          const Int m = std::min(at_once, rows * in_row - t);
          const Half* from[4];
          for (Int i = 0; i < m; ++i)
            from[i] = z + (t + i) / in_row * plan.step_h * line + (t + i) % in_row * wide * plan.step_w * plan.channels;
          MultiplyOf<false>(m, n)(from, a_bytes, packed[p].offsets.data(), steps, packed[p].tiles + block * steps * kTile,
                                  steps * kTile, places);
          for (Int i = 0; i < m; ++i) {
            const Int row = first + (t + i) / in_row, column = (t + i) % in_row * wide;
            const Int at = (image * plan.out_h + phase.first_h + row * plan.spread_h) * plan.out_w + phase.first_w +
                           column * plan.spread_w;
            (n == 1 ? Round<1> : Round<2>)(places[i * n], std::min(wide, phase.columns - column), lanes,
                                           y + at * plan.out_channels + block * kColumns,
                                           plan.spread_w * plan.out_channels);
          }
        }
      }
    }
  });
}

void Forward(ffi::ThreadPool& pool, const Shape& s, const Half* x, const Half* w, Half* y) {
  Correlate(pool, ForwardPlan(s), x, w, y);
}

void InputGradient(ffi::ThreadPool& pool, const Shape& s, const Half* y, const Half* w, Half* x) {
  Correlate(pool, InputGradientPlan(s), y, w, x);
}

// --- the gradient of the kernel ---

// Pairs of neighbouring positions: (a_0, b_0, a_1, b_1, …) of 16 channels each.
inline __m512i Interleave(const Half* a, const Half* b) {
  alignas(64) static constexpr Half order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const auto load = [](const Half* from) {
    return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  };
  return _mm512_permutex2var_epi16(load(a), _mm512_load_si512(order), load(b));
}

typedef int Lanes __attribute__((vector_size(64)));

// Exchanges blocks of H × H of the rows a and b of 32-bit numbers, H apart: one step of a transposition.
template <int H, int... K>
inline void Exchange(Lanes& a, Lanes& b, std::integer_sequence<int, K...>) {
  const Lanes upper = __builtin_shufflevector(a, b, (K & H ? 16 + K - H : K)...);
  b = __builtin_shufflevector(a, b, (K & H ? 16 + K : K + H)...);
  a = upper;
}

template <int H>
inline void Transpose(Lanes* v) {
  if constexpr (H > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (!(i & H)) Exchange<H>(v[i], v[i | H], std::make_integer_sequence<int, 16>());
    Transpose<H / 2>(v);
  }
}

// to[c · line + q] = z[q · channels + c] for q < count, a multiple of 32. Reads up to a vector beyond.
void TransposePositions(const Half* z, Int count, Int channels, Half* to, Int line) {
  for (Int c = 0; c < channels; c += 16)
    for (Int q = 0; q < count; q += 32) {
      Lanes v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        v[i] = (Lanes)Interleave(z + (q + 2 * i) * channels + c, z + (q + 2 * i + 1) * channels + c);
      Transpose<8>(v);
      for (Int i = 0; i < std::min<Int>(16, channels - c); ++i) _mm512_store_si512(to + (c + i) * line + q, (__m512i)v[i]);
    }
}

// How the gradient of a kernel is computed: rows and columns are those of the outputs, with what else taps reach.
struct Strips {
  Int reach_h, reach_w;     // of taps, in rows and columns of a phase
  Int rows, bands;          // rows of outputs at a time, and how many such bands an image has
  Int pitch_h, pitch_w;     // rows and columns that a band takes
  Int at_once, positions;   // bands at a time, and their positions, a multiple of 32
  Int line;                 // from one channel to the next
  Int blocks, high;         // of inputs: how many tiles, and channels of each
  Int wide;                 // blocks of 16 outputs

  explicit Strips(const Shape& s) {
    reach_h = (s.taps_h - 1) * s.dilation_h / s.stride_h, reach_w = (s.taps_w - 1) * s.dilation_w / s.stride_w;
    pitch_w = s.out_w + reach_w;
    const Int most = std::max<Int>(kDepth, kStrip / (s.inputs + s.outputs));
    bands = Ceil(s.out_h, std::clamp<Int>(most / pitch_w - reach_h, 1, s.out_h)), rows = Ceil(s.out_h, bands);
    bands = Ceil(s.out_h, rows), pitch_h = rows + reach_h;
    at_once = std::max<Int>(1, most / (pitch_h * pitch_w));
    positions = Ceil(at_once * pitch_h * pitch_w, kDepth) * kDepth;
    line = (Ceil(positions + reach_h * pitch_w + reach_w, kDepth) + 1) * kDepth;
    if (line / kDepth % 2 == 0) line += kDepth;  // so that channels do not compete for the same places of the cache
    blocks = Ceil(s.inputs, kRows), high = Ceil(s.inputs, blocks), wide = Ceil(s.outputs, kColumns);
  }
};

// One tap and one block of inputs: where its tile begins.
std::vector<Int> TilesOf(const Shape& s, const Strips& g) {
  std::vector<Int> begins;
  for (Int k = 0; k < s.taps_h; ++k)
    for (Int l = 0; l < s.taps_w; ++l) {
      const Int row = k * s.dilation_h, column = l * s.dilation_w;
      const Int phase = row % s.stride_h * s.stride_w + column % s.stride_w;
      for (Int b = 0; b < g.blocks; ++b)
        begins.push_back((phase * g.blocks + b) * g.high * g.line + row / s.stride_h * g.pitch_w + column / s.stride_w);
    }
  return begins;
}

// The sum over some bands: (block of outputs, tap, block of inputs, 16 inputs, 16 outputs).
void PartOfKernel(const Shape& s, const Strips& g, Int first, Int last, const Half* x, const Half* y, float* total) {
  const std::vector<Int> begins = TilesOf(s, g);
  const Int tiles = begins.size(), area = g.pitch_h * g.pitch_w, phases = s.stride_h * s.stride_w;
  Half* transposed = Scratch<0, Half>(phases * g.blocks * g.high * g.line);
  Half* z = Scratch<1, Half>(g.positions * std::max(s.inputs, s.outputs) + kDepth);
  Half* pairs = Scratch<2, Half>(g.wide * g.positions * kColumns);
  std::vector<Int> offsets(g.positions / kDepth);
  for (size_t i = 0; i < offsets.size(); ++i) offsets[i] = i * kDepth;
  std::vector<bool> used(phases);
  for (Int k = 0; k < s.taps_h; ++k)
    for (Int l = 0; l < s.taps_w; ++l)
      used[k * s.dilation_h % s.stride_h * s.stride_w + l * s.dilation_w % s.stride_w] = true;
  std::memset(total, 0, sizeof(float) * g.wide * tiles * kSums);

  for (Int begin = first; begin < last; begin += g.at_once) {
    const Int bands = std::min(g.at_once, last - begin), positions = Ceil(bands * area, kDepth) * kDepth;
    for (Int phase = 0; phase < phases; ++phase) {
      if (!used[phase]) continue;
      for (Int b = 0; b < bands; ++b) {
        const Int image = (begin + b) / g.bands, top = (begin + b) % g.bands * g.rows * s.stride_h - s.pad_h;
        for (Int r = 0; r < g.pitch_h; ++r)
          ReadRow(x + image * s.height * s.width * s.inputs, s.height, s.width, s.inputs,
                  top + r * s.stride_h + phase / s.stride_w, phase % s.stride_w - s.pad_w, s.stride_w, g.pitch_w,
                  z + (b * area + r * g.pitch_w) * s.inputs);
      }
      std::memset(z + bands * area * s.inputs, 0, sizeof(Half) * (positions - bands * area) * s.inputs);
      Half* to = transposed + phase * g.blocks * g.high * g.line;
      TransposePositions(z, positions, s.inputs, to, g.line);
      for (Int c = 0; c < s.inputs; ++c)
        std::memset(to + c * g.line + positions, 0, sizeof(Half) * (g.line - positions));
    }
    for (Int b = 0; b < bands; ++b) {
      const Int image = (begin + b) / g.bands, top = (begin + b) % g.bands * g.rows;
      for (Int r = 0; r < g.pitch_h; ++r)
        ReadRow(y + image * s.out_h * s.out_w * s.outputs, r < g.rows ? s.out_h : 0, s.out_w, s.outputs, top + r, 0, 1,
                g.pitch_w, z + (b * area + r * g.pitch_w) * s.outputs);
    }
    std::memset(z + bands * area * s.outputs, 0, sizeof(Half) * (positions - bands * area) * s.outputs);
    for (Int n = 0; n < g.wide; ++n)
      for (Int q = 0; q < positions; q += 2) {
        const Half* from = z + q * s.outputs + n * kColumns;
        _mm512_store_si512(pairs + (n * g.positions + q) * kColumns, Interleave(from, from + s.outputs));
      }
    const Tiles loaded(g.high);
    for (Int block = 0; block < g.wide; block += 2) {
      const Int n = std::min<Int>(2, g.wide - block), at_once = 4 / n;
      for (Int t = 0; t < tiles; t += at_once) {
        const Int m = std::min(at_once, tiles - t);
        const Half* from[4];
        float* sums[4];
        for (Int i = 0; i < m; ++i) {
          from[i] = transposed + begins[t + i];
          for (Int j = 0; j < n; ++j) sums[i * n + j] = total + ((block + j) * tiles + t + i) * kSums;
        }
        MultiplyOf<true>(m, n)(from, g.line * sizeof(Half), offsets.data(), positions / kDepth,
                               pairs + block * g.positions * kColumns, g.positions * kColumns, sums);
      }
    }
  }
}

Half Rounded(float value) { return (Half)_mm_cvtness_sbh(value); }

void KernelGradient(ffi::ThreadPool& pool, const Shape& s, const Half* x, const Half* y, Half* w) {
  const Strips g(s);
  const Int taps = s.taps_h * s.taps_w, size = g.wide * taps * g.blocks * kSums, bands = s.images * g.bands;
  const Int parts = std::clamp<Int>(std::min(kParts, kPartial / size), 1, bands);
  Buffer<float> memory;
  float* totals = memory.Grow(size * parts);
  Parallel(pool, parts, [&](Int part) {
    PartOfKernel(s, g, part * bands / parts, (part + 1) * bands / parts, x, y, totals + part * size);
  });
  Parallel(pool, taps, [&](Int tap) {
    for (Int c = 0; c < s.inputs; ++c)
      for (Int o = 0; o < s.outputs; ++o) {
        const Int tile = (o / kColumns * taps + tap) * g.blocks + c / g.high;
        float sum = 0;
        for (Int part = 0; part < parts; ++part)
          sum += totals[part * size + tile * kSums + c % g.high * kColumns + o % kColumns];
        w[(tap * s.inputs + c) * s.outputs + o] = Rounded(sum);
      }
  });
}

}  // namespace

// Asks the operating system for the use of tiles in this process; 0 if it is granted.
extern "C" int kdsearch_request_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? 0 : 1;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(kdsearch_forward_bf16, (Run<ffi::BF16, Half, Forward>), Binding<ffi::BF16>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kdsearch_input_gradient_bf16, (Run<ffi::BF16, Half, InputGradient>),
                              Binding<ffi::BF16>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kdsearch_kernel_gradient_bf16, (Run<ffi::BF16, Half, KernelGradient>),
                              Binding<ffi::BF16>());
