// The convolutions of convolution.cc by AMX, the matrix unit of x86 processors: for bfloat16 arrays, and for float32
// ones whose numbers are rounded to bfloat16 before they are multiplied.
//
// AMX multiplies tiles: 16 × 32 numbers by 32 × 16, whose rows lie in pairs, and adds the products to 16 × 16 sums in
// float32. Results are rounded only for bfloat16 arrays. Like AMX itself, these functions take subnormal numbers for
// zero. A tile is loaded row by row, three times as fast where each row lies within a cache line.
//
// Values and the gradient of the input: a tile has the channels of 16 neighbouring outputs at one tap. The rows of an
// image are copied with zeros beside them, and with channels filled up with zeros to 16 or a multiple of 32.
//
// The gradient of the kernel is a sum over positions: a tile has 16 outputs' gradients of y at 32 positions, times one
// tap's and 16 inputs' x at these positions in pairs. Positions are numbered with the row length of x, so that a tap is
// an offset, and y is zero in between; x lies there in pairs from even positions on and from odd ones. There is one
// such array for each phase of the stride.
//
// Work is cut into the same pieces whatever the number of threads, so results do not depend on it.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "convolution.h"

namespace {

using Half = uint16_t;  // the bits of a bfloat16

constexpr Int kRows = 16, kDepth = 32, kColumns = 16;  // of a tile: of the sums, of what is summed over, of the sums
constexpr Int kSums = kRows * kColumns;
constexpr Int kBand = 1 << 17;     // numbers of a band of rows: they should stay in the second-level cache
constexpr Int kStrip = 1 << 16;    // bytes that a kernel's gradient works with at a time, unless they hold fewer
constexpr Int kPositions = 256;    // positions than this
constexpr Int kParts = 16;         // pieces of a kernel's gradient
constexpr Int kPartial = 1 << 24;  // floats of the sums of these pieces, before they are added

// Numbers whose first begins a cache line, with two cache lines beyond the last.
template <typename T>
class Buffer {
 public:
  T* Grow(Int size) {
    const Int bytes = size * sizeof(T) + 192;
    if (bytes > bytes_) memory_.reset(new char[bytes]), bytes_ = bytes;
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t{63});
  }

 private:
  std::unique_ptr<char[]> memory_;
  Int bytes_ = 0;
};

// Memory of this thread, whatever is in it; one for each number.
template <int number, typename T>
T* Scratch(Int size) {
  static thread_local Buffer<T> memory;
  return memory.Grow(size);
}

inline Half Rounded(Half value) { return value; }
inline Half Rounded(float value) {
  return static_cast<Half>(_mm_cvtsi128_si32((__m128i)_mm_cvtneps_pbh(_mm_set_ss(value))));
}

// --- tiles ---

// Sums are in tiles 0 to 3, left factors in 4 and 5, right ones in 6 and 7. The operating system must have granted
// their use.
class Tiles {
 public:
  Tiles(Int rows, Int depth) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int t = 0; t < 4; ++t) shape.bytes[t] = 4 * kColumns, shape.rows[t] = rows;
    for (int t = 4; t < 6; ++t) shape.bytes[t] = 2 * depth, shape.rows[t] = rows;
    for (int t = 6; t < 8; ++t) shape.bytes[t] = 4 * kColumns, shape.rows[t] = depth / 2;
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

// One step: the products of M left tiles by N right ones. M · N is at most 4; m and n are where the loops are.
template <int M, int N, int m = 0, int n = 0>
inline void Step(const Half* const* a, Int at, Int a_bytes, const Half* const* b, Int b_at) {
  constexpr bool kEach = N > 2;  // right tiles do not stay, and there is one left tile
  if constexpr (m == 0 && n == 0) {
    if constexpr (kEach) Load<4>(a[0] + at, a_bytes);
    if constexpr (!kEach) Load<6>(b[0] + b_at, 64);
    if constexpr (N == 2) Load<7>(b[1] + b_at, 64);
  }
  if constexpr (kEach) Load<6 + n % 2>(b[n] + b_at, 64);
  if constexpr (!kEach && n == 0) Load<4 + m % 2>(a[m] + at, a_bytes);
  MultiplyAdd<m * N + n, 4 + m % 2, 6 + n % 2>();
  if constexpr (n + 1 < N)
    Step<M, N, m, n + 1>(a, at, a_bytes, b, b_at);
  else if constexpr (m + 1 < M)
    Step<M, N, m + 1, 0>(a, at, a_bytes, b, b_at);
}

template <int count, bool add>
inline void Begin(float* const* sums) {
  if constexpr (count > 0) {
    Begin<count - 1, add>(sums);
    if constexpr (add)
      Load<count - 1>(sums[count - 1], 64);
    else
      Zero<count - 1>();
  }
}

template <int count>
inline void Finish(float* const* sums) {
  if constexpr (count > 0) {
    Finish<count - 1>(sums);
    Store<count - 1>(sums[count - 1]);
  }
}

// Tiles of A and B, and how they go on: a row of A begins `a_bytes` after the previous one, a step of A at `offsets`,
// one of B `b_step` after the previous one.
struct Factors {
  const Half *a[4], *b[4];
  Int a_bytes, b_step, steps;
  const Int* offsets;
  float* sums[4];  // of tiles m and n at m · N + n: what is added to (`add`), and the results
};

template <int M, int N, bool add>
void Multiply(const Factors& f) {
  Begin<M * N, add>(f.sums);
  for (Int s = 0; s < f.steps; ++s) Step<M, N>(f.a, f.offsets[s], f.a_bytes, f.b, s * f.b_step);
  Finish<M * N>(f.sums);
}

template <bool add>
void Multiply(Int m, Int n, const Factors& f) {
  static constexpr decltype(&Multiply<1, 1, add>) functions[4][4] = {
      {Multiply<1, 1, add>, Multiply<1, 2, add>, Multiply<1, 3, add>, Multiply<1, 4, add>},
      {Multiply<2, 1, add>, Multiply<2, 2, add>},
      {Multiply<3, 1, add>},
      {Multiply<4, 1, add>}};
  functions[m - 1][n - 1](f);
}

// --- forward, and the gradient of the input ---

// The kernel of a phase as tiles, (block of outputs, tap, block of inputs, pairs, 16 outputs, 2), and what each reads.
struct Packed {
  std::vector<Int> offsets;
  Buffer<Half> memory;
  Half* tiles = nullptr;
};

template <typename T>
void Pack(const Plan& plan, const Phase& phase, const T* w, Int depth, Packed* packed) {
  const Int blocks = Ceil(plan.out_channels, kColumns), in_tap = Ceil(plan.channels, depth) * depth * kColumns;
  const Int size = blocks * phase.taps.size() * in_tap;
  packed->tiles = packed->memory.Grow(size);
  std::memset(packed->tiles, 0, sizeof(Half) * size);
  Half* to = packed->tiles;
  for (Int block = 0; block < blocks; ++block) {
    const Int outputs = std::min(kColumns, plan.out_channels - block * kColumns);
    for (const Tap& tap : phase.taps) {
      const T* from = w + tap.kernel * plan.kernel_tap + block * kColumns * plan.kernel_output;
      for (Int c = 0; c < plan.channels; ++c, from += plan.kernel_input)
        for (Int o = 0; o < outputs; ++o)
          to[(c / 2 * kColumns + o) * 2 + c % 2] = Rounded(from[o * plan.kernel_output]);
      to += in_tap;
    }
  }
}

// Copies `rows` rows of N tiles of sums; a row has `lanes` of them, and the next begins `step` further in y.
template <int N>
void Write(const float* sums, Int rows, Int lanes, Half* y, Int step) {
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

template <int N>
void Write(const float* sums, Int rows, Int lanes, float* y, Int step) {
  const auto mask = static_cast<__mmask16>((1u << (lanes - (N - 1) * kColumns)) - 1);
  for (Int r = 0; r < rows; ++r, sums += kColumns, y += step) {
    if constexpr (N > 1) _mm512_storeu_ps(y, _mm512_load_ps(sums));
    _mm512_mask_storeu_ps(y + (N - 1) * kColumns, mask, _mm512_load_ps(sums + (N - 1) * kSums));
  }
}

template <typename T>
void Write(Int tiles, const float* sums, Int rows, Int lanes, T* y, Int step) {
  if (tiles == 1)
    Write<1>(sums, rows, lanes, y, step);
  else
    Write<2>(sums, rows, lanes, y, step);
}

// Up to 16 numbers as bfloat16.
inline __m256i Narrow(const Half* from, __mmask16 mask) { return _mm256_maskz_loadu_epi16(mask, from); }
inline __m256i Narrow(const float* from, __mmask16 mask) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from));
}

inline __mmask16 MaskOf(Int lanes) { return lanes >= 16 ? 0xffff : lanes > 0 ? (1u << lanes) - 1 : 0; }

// Copies `count` pixels, `step` apart; each has `wide` numbers afterwards, a multiple of 16, the last of them zeros.
template <typename T>
void CopyPixels(const T* from, Int step, Int count, Int channels, Int wide, Half* to) {
  if (step == channels && wide == channels) channels = step = wide = count * wide, count = 1;
  for (Int c = 0; c < wide; c += 16) {
    const __mmask16 mask = MaskOf(channels - c);
    for (Int j = 0; j < count; ++j)
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + j * wide + c), Narrow(from + j * step + c, mask));
  }
}

// Numbers `from` to `to` of an array of `size` that are needed soon: brings them to the second-level cache, some
// whenever `Some` is called.
class Soon {
 public:
  template <typename T>
  Soon(const T* array, Int from, Int to, Int size, Int calls)
      : at_(reinterpret_cast<const char*>(array + std::min(from, size))),
        end_(reinterpret_cast<const char*>(array + std::min(to, size))),
        step_(Ceil(Ceil(end_ - at_, 64), std::max<Int>(1, calls))) {}
  void Some() {
    for (Int i = 0; i < step_ && at_ < end_; ++i, at_ += 64) _mm_prefetch(at_, _MM_HINT_T1);
  }

 private:
  const char *at_, *end_;
  Int step_;
};

template <typename T>
struct Image {
  const T* pixels;
  Int height, width, channels;
};

// `count` pixels of a row, every `step`-th from column `low` on, with zeros beside the image.
template <typename T>
void ReadRow(const Image<T>& image, Int row, Int low, Int step, Int count, Int wide, Half* to) {
  const bool inside = row >= 0 && row < image.height;
  const Int end = inside ? std::clamp<Int>(Ceil(image.width - low, step), 0, count) : 0;
  const Int begin = std::min(end, low < 0 ? Ceil(-low, step) : 0);
  std::memset(to, 0, sizeof(Half) * begin * wide);
  if (begin < end)
    CopyPixels(image.pixels + (row * image.width + low + begin * step) * image.channels, step * image.channels,
               end - begin, image.channels, wide, to + begin * wide);
  std::memset(to + end * wide, 0, sizeof(Half) * (count - end) * wide);
}

template <typename T>
void Correlate(ffi::ThreadPool& pool, const Plan& plan, const T* x, const T* w, T* y) {
  const Reach reach = ReachOf(plan);
  const Int depth = plan.channels <= kDepth / 2 ? kDepth / 2 : kDepth, channels = Ceil(plan.channels, depth) * depth;
  const Int per_row = Ceil(reach.columns, kRows), wide = Ceil(reach.columns, per_row);  // tiles of a row; their outputs
  const Int columns = (per_row * wide - 1) * plan.step_w + reach.high_w - reach.low_w + 1, line = columns * channels;
  const Int span = reach.high_h - reach.low_h + 1;
  const Int fit = std::max<Int>(1, (kBand / line - span) / plan.step_h + 1);
  const Int bands = Ceil(reach.rows, std::min(fit, reach.rows)), band = Ceil(reach.rows, bands);
  const Int blocks = Ceil(plan.out_channels, kColumns);

  std::vector<Packed> packed(plan.phases.size());
  for (size_t p = 0; p < packed.size(); ++p) {
    Pack(plan, plan.phases[p], w, depth, &packed[p]);
    for (const Tap& tap : plan.phases[p].taps)
      for (Int c = 0; c < channels; c += depth)
        packed[p].offsets.push_back((tap.row - reach.low_h) * line + (tap.column - reach.low_w) * channels + c);
  }

  Parallel(pool, plan.images * bands, [&](Int job) {
    const Int number = job / bands, first = job % bands * band, end = std::min(first + band, reach.rows);
    if (end <= first) return;
    const Image<T> image{x + number * plan.height * plan.width * plan.channels, plan.height, plan.width, plan.channels};
    const Int needed = (end - first - 1) * plan.step_h + span;
    Half* z = Scratch<0, Half>(needed * line);
    for (Int r = 0; r < needed; ++r)
      ReadRow(image, first * plan.step_h + reach.low_h + r, reach.low_w, 1, columns, channels, z + r * line);
    float* sums = Scratch<1, float>(4 * kSums);
    Factors f;
    f.a_bytes = plan.step_w * channels * sizeof(Half), f.b_step = depth * kColumns;
    for (Int i = 0; i < 4; ++i) f.sums[i] = sums + i * kSums;
    const Int size = plan.height * plan.width * plan.channels;
    const Int calls = Ceil((end - first) * per_row, blocks > 1 ? 2 : 4) * Ceil(blocks, 2);
    Soon next(x, size * (job + 1) / bands, size * (job + 2) / bands, size * plan.images, calls);
    const Tiles tiles(wide, depth);
    for (size_t p = 0; p < packed.size(); ++p) {
      const Phase& phase = plan.phases[p];
      const Int rows = std::min(end, phase.rows) - first, in_row = Ceil(phase.columns, wide);
      f.offsets = packed[p].offsets.data(), f.steps = packed[p].offsets.size();
      for (Int block = 0; block < blocks; block += 2) {
        const Int n = std::min<Int>(2, blocks - block), at_once = 4 / n;
        const Int lanes = std::min(n * kColumns, plan.out_channels - block * kColumns);
        for (Int i = 0; i < n; ++i) f.b[i] = packed[p].tiles + (block + i) * f.steps * f.b_step;
        for (Int t = 0; t < rows * in_row; t += at_once) {
          const Int m = std::min(at_once, rows * in_row - t);
          for (Int i = 0; i < m; ++i)
            f.a[i] = z + (t + i) / in_row * plan.step_h * line + (t + i) % in_row * wide * plan.step_w * channels;
          Multiply<false>(m, n, f);
          next.Some();
          for (Int i = 0; i < m; ++i) {
            const Int row = first + (t + i) / in_row, column = (t + i) % in_row * wide;
            const Int at = (number * plan.out_h + phase.first_h + row * plan.spread_h) * plan.out_w + phase.first_w +
                           column * plan.spread_w;
            Write(n, f.sums[i * n], std::min(wide, phase.columns - column), lanes,
                                           y + at * plan.out_channels + block * kColumns,
                                           plan.spread_w * plan.out_channels);
          }
        }
      }
    }
  });
}

template <typename T>
void Forward(ffi::ThreadPool& pool, const Shape& s, const T* x, const T* w, T* y) {
  Correlate(pool, ForwardPlan(s), x, w, y);
}

template <typename T>
void InputGradient(ffi::ThreadPool& pool, const Shape& s, const T* y, const T* w, T* x) {
  Correlate(pool, InputGradientPlan(s), y, w, x);
}

// --- the gradient of the kernel ---

// Pairs of neighbouring positions: (a_0, b_0, a_1, b_1, …) of 16 channels each.
inline __m512i Interleave(__m256i a, __m256i b) {
  alignas(64) static constexpr Half order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return _mm512_permutex2var_epi16(_mm512_castsi256_si512(a), _mm512_load_si512(order), _mm512_castsi256_si512(b));
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

// to[c · line + q] = z[q · channels + c] for q < count, a multiple of 32; channels are a multiple of 16.
void TransposePositions(const Half* z, Int count, Int channels, Half* to, Int line) {
  for (Int c = 0; c < channels; c += 16)
    for (Int q = 0; q < count; q += 32) {
      Lanes v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        v[i] = (Lanes)Interleave(Narrow(z + (q + 2 * i) * channels + c, 0xffff),
                                 Narrow(z + (q + 2 * i + 1) * channels + c, 0xffff));
      Transpose<8>(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + (c + i) * line + q, (__m512i)v[i]);
    }
}

// How the gradient of a kernel is computed. Bands are rows of outputs of one image; positions those of x's phases.
struct Strips {
  Int rows, bands;         // rows of outputs at a time, and how many such bands an image has
  Int pitch_h, pitch_w;    // rows and columns that a band takes, with those that only taps reach
  Int at_once, positions;  // bands at a time, and their positions, a multiple of 32
  Int line;                // positions with what taps reach beyond, an odd number of cache lines
  Int inputs, outputs;     // blocks of 16 of them

  explicit Strips(const Shape& s) {
    const Int reach_h = (s.taps_h - 1) * s.dilation_h / s.stride_h;
    const Int reach_w = (s.taps_w - 1) * s.dilation_w / s.stride_w;
    inputs = Ceil(s.inputs, 16), outputs = Ceil(s.outputs, 16);
    pitch_w = s.out_w + reach_w;
    const Int most = std::max(kPositions, kStrip / (64 * inputs * s.stride_h * s.stride_w + 64 * outputs));
    bands = Ceil(s.out_h, std::clamp<Int>(most / pitch_w - reach_h, 1, s.out_h)), rows = Ceil(s.out_h, bands);
    bands = Ceil(s.out_h, rows), pitch_h = rows + reach_h;
    at_once = std::max<Int>(1, most / (pitch_h * pitch_w));
    positions = Ceil(at_once * pitch_h * pitch_w, kDepth) * kDepth;
    line = Ceil(positions + reach_h * pitch_w + reach_w + 1, kDepth) * kDepth;
    if (line / kDepth % 2 == 0) line += kDepth;
  }
};

// What one part of a kernel's gradient works with.
class Part {
 public:
  Part(const Shape& shape, const Strips& strips) : s(shape), g(strips), phases(s.stride_h * s.stride_w), used(phases) {
    y_ = Scratch<0, Half>(g.outputs * 16 * g.line);
    x_ = Scratch<1, Half>(phases * g.inputs * 2 * g.line * 16);
    z_ = Scratch<2, Half>(g.positions * 16 * g.outputs);
    for (Int q = 0; q < g.positions; q += kDepth) offsets_.push_back(q);
    for (Int k = 0; k < s.taps_h; ++k)
      for (Int l = 0; l < s.taps_w; ++l) {
        const Int row = k * s.dilation_h, column = l * s.dilation_w;
        const Int phase = row % s.stride_h * s.stride_w + column % s.stride_w;
        const Int at = row / s.stride_h * g.pitch_w + column / s.stride_w;
        used[phase] = true;
        for (Int b = 0; b < g.inputs; ++b) begins_.push_back(Pairs(phase, b, at % 2) + at / 2 * 32);
      }
  }

  // Adds the sum over some bands to `total`, (block of outputs, tap, block of inputs, 16 outputs, 16 inputs).
  template <typename T>
  void Add(Int first, Int last, const T* x, const T* y, float* total) {
    for (; first < last; first += g.at_once) {
      const Int bands = std::min(g.at_once, last - first);
      for (Int phase = 0; phase < phases; ++phase)
        if (used[phase]) ReadX(first, bands, phase, x);
      ReadY(first, bands, y);
      const Int tiles = begins_.size();
      Factors f;
      f.a_bytes = g.line * sizeof(Half), f.b_step = kDepth * kColumns;
      f.offsets = offsets_.data(), f.steps = Ceil((bands * g.pitch_h - (g.pitch_h - g.rows)) * g.pitch_w, kDepth);
      const Int calls = Ceil(g.outputs, 2) * Ceil(tiles, g.outputs > 1 ? 2 : 4);
      const auto band = [&](Int number, Int size) { return size * number / g.bands; };
      const Int size_x = s.height * s.width * s.inputs, size_y = s.out_h * s.out_w * s.outputs, next = first + bands;
      Soon next_x(x, band(next, size_x), band(next + bands, size_x), s.images * size_x, calls);
      Soon next_y(y, band(next, size_y), band(next + bands, size_y), s.images * size_y, calls);
      const Tiles loaded(kRows, kDepth);
      for (Int block = 0; block < g.outputs; block += 2) {
        const Int m = std::min<Int>(2, g.outputs - block), at_once = 4 / m;
        for (Int i = 0; i < m; ++i) f.a[i] = y_ + (block + i) * 16 * g.line;
        for (Int t = 0; t < tiles; t += at_once) {
          const Int n = std::min(at_once, tiles - t);
          for (Int j = 0; j < n; ++j) {
            f.b[j] = x_ + begins_[t + j];
            for (Int i = 0; i < m; ++i) f.sums[i * n + j] = total + ((block + i) * tiles + t + j) * kSums;
          }
          Multiply<true>(m, n, f);
          next_x.Some(), next_y.Some();
        }
      }
    }
  }

 private:
  Int Pairs(Int phase, Int block, Int odd) const { return ((phase * g.inputs + block) * 2 + odd) * g.line * 16; }

  // Position q and the next are a pair of the even positions or of the odd ones.
  template <typename T>
  void ReadX(Int first, Int bands, Int phase, const T* x) {
    const Int low = phase % s.stride_w - s.pad_w, step = s.stride_w * s.inputs;
    const Int end = std::clamp<Int>(Ceil(s.width - low, s.stride_w), 0, g.pitch_w);
    const Int begin = std::min(end, low < 0 ? Ceil(-low, s.stride_w) : 0);
    for (Int block = 0; block < g.inputs; ++block) {
      Half* const to[] = {x_ + Pairs(phase, block, 0), x_ + Pairs(phase, block, 1)};
      const __mmask16 mask = MaskOf(s.inputs - block * 16);
      __m256i last = _mm256_setzero_si256();
      Int q = -1;  // its pair overwrites the last one of the even positions, which nothing reads
      const auto append = [&](__m256i next) {
        _mm512_store_si512(to[q & 1] + (q >> 1) * 32, Interleave(last, next));
        last = next, ++q;
      };
      const auto zeros = [&](Int count) {
        for (Int j = 0; j < count; ++j) append(_mm256_setzero_si256());
      };
      for (Int b = 0; b < bands; ++b) {
        const Int top = (first + b) % g.bands * g.rows * s.stride_h - s.pad_h + phase / s.stride_w;
        for (Int r = 0; r < g.pitch_h; ++r) {
          const Int row = top + r * s.stride_h;
          if (row < 0 || row >= s.height) {
            zeros(g.pitch_w);
            continue;
          }
          zeros(begin);
          const T* from = x + (((first + b) / g.bands * s.height + row) * s.width + low) * s.inputs + block * 16;
          for (Int j = begin; j < end; ++j) append(Narrow(from + j * step, mask));
          zeros(g.pitch_w - end);
        }
      }
      zeros(g.line - 1 - q);
    }
  }

  template <typename T>
  void ReadY(Int first, Int bands, const T* y) {
    const Int wide = g.outputs * 16, area = g.pitch_h * g.pitch_w;
    for (Int b = 0; b < bands; ++b) {
      const Image<T> image{y + (first + b) / g.bands * s.out_h * s.out_w * s.outputs, s.out_h, s.out_w, s.outputs};
      for (Int r = 0; r < g.pitch_h; ++r)
        ReadRow(image, r < g.rows ? (first + b) % g.bands * g.rows + r : -1, 0, 1, g.pitch_w, wide,
                z_ + (b * area + r * g.pitch_w) * wide);
    }
    const Int positions = Ceil(bands * area, kDepth) * kDepth;
    std::memset(z_ + bands * area * wide, 0, sizeof(Half) * (positions - bands * area) * wide);
    TransposePositions(z_, positions, wide, y_, g.line);
  }

  const Shape& s;
  const Strips& g;
  Int phases;
  std::vector<bool> used;      // phases that a tap reads
  Half *y_, *x_, *z_;          // (output, position); (phase, block of inputs, odd, pair, 16, 2); (position, output)
  std::vector<Int> offsets_;   // of the steps in y_
  std::vector<Int> begins_;    // of the taps' and blocks' pairs in x_
};

template <typename T>
void KernelGradient(ffi::ThreadPool& pool, const Shape& s, const T* x, const T* y, T* w) {
  const Strips g(s);
  const Int taps = s.taps_h * s.taps_w, size = g.outputs * taps * g.inputs * kSums, bands = s.images * g.bands;
  const Int parts = std::clamp<Int>(std::min(kParts, kPartial / size), 1, bands);
  Buffer<float> memory;
  float* totals = memory.Grow(size * parts);
  Parallel(pool, parts, [&](Int part) {
    std::memset(totals + part * size, 0, sizeof(float) * size);
    Part(s, g).Add(part * bands / parts, (part + 1) * bands / parts, x, y, totals + part * size);
  });
  Parallel(pool, size / kSums, [&](Int tile) {
    const Int tap = tile / g.inputs % taps, first_c = tile % g.inputs * 16, first_o = tile / g.inputs / taps * 16;
    Lanes v[16];
    for (int o = 0; o < 16; ++o) {
      __m512 sum = _mm512_setzero_ps();
      for (Int part = 0; part < parts; ++part)
        sum = _mm512_add_ps(sum, _mm512_load_ps(totals + part * size + tile * kSums + o * 16));
      v[o] = (Lanes)sum;
    }
    Transpose<8>(v);
    for (Int c = 0; c < std::min<Int>(16, s.inputs - first_c); ++c)
      Write<1>(reinterpret_cast<const float*>(v + c), 1, std::min<Int>(16, s.outputs - first_o),
               w + (tap * s.inputs + first_c + c) * s.outputs + first_o, 0);
  });
}

}  // namespace

// Asks the operating system for the use of tiles in this process; 0 if it is granted.
extern "C" int kdsearch_request_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? 0 : 1;
}

#define KDSEARCH_HANDLERS(suffix, type, T)                                                                             \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(kdsearch_forward_##suffix, (Run<type, T, Forward<T>>), Binding<type>());               \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(kdsearch_input_gradient_##suffix, (Run<type, T, InputGradient<T>>), Binding<type>());  \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(kdsearch_kernel_gradient_##suffix, (Run<type, T, KernelGradient<T>>), Binding<type>())

KDSEARCH_HANDLERS(bf16, ffi::BF16, Half);
KDSEARCH_HANDLERS(rounded, ffi::F32, float);
