// Convolutions of float32 arrays for XLA's CPU backend: the values, and the gradients of both operands.
//
//   forward          y[n, i, j, o] = Σ_{k, l, c} x[n, i·stride + k·dilation − pad, …, c] w[k, l, c, o]
//   input gradient   x[n, r, s, c] = Σ_{i, j, o} y[n, i, j, o] w[k, l, c, o]   where r = i·stride + k·dilation − pad
//   kernel gradient  w[k, l, c, o] = Σ_{n, i, j} x[n, i·stride + k·dilation − pad, …, c] y[n, i, j, o]
//
// Arrays are dense and channels last, kernels (height, width, inputs, outputs). The first two are one computation
// (`Correlate`): a tile of neighbouring outputs times one or two vectors of channels, or of channels times vectors of
// neighbours, stays in registers while the sum runs over taps and inputs; the rows that a band of outputs reads are
// laid out as (row, channel, column) before, so that neighbours are neighbours in memory. A gradient of the input under
// strides is one such computation for each phase of the stride, with the taps that meet it. In the third, a tile of
// inputs times vectors of outputs stays in registers while the sum runs over positions.
//
// Work is cut into the same pieces whatever the number of threads, so results do not depend on it.

#include <utility>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "convolution.h"

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kWide1 = 16, kWide2 = 12;  // floats of a vector; tiles of one and of two vectors
#elif defined(__AVX__)
constexpr int kLanes = 8, kWide1 = 8, kWide2 = 6;
#else
constexpr int kLanes = 4, kWide1 = 8, kWide2 = 6;
#endif
constexpr Int kLine = 16;        // floats of a cache line
constexpr Int kBand = 1 << 16;   // floats of a band of rows: they should stay in the second-level cache
constexpr Int kRows = 1 << 12;   // floats of the rows that a kernel's gradient goes through at once
constexpr Int kPositions = 48;  // of the output, that it goes through at least
constexpr Int kParts = 8;        // pieces of a kernel's gradient
constexpr Int kPartial = 1 << 22;  // floats of the sums of these pieces, before they are added

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4)));

// Floats whose first begins a cache line, with a vector beyond the last.
class Floats {
 public:
  explicit Floats(Int size = 0) { Grow(size); }
  float* Grow(Int size) {
    if (size + 2 * kLine > static_cast<Int>(memory_.size())) memory_.resize(size + 2 * kLine);
    return data();
  }
  float* data() {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return reinterpret_cast<float*>((address + 4 * kLine - 1) & ~uintptr_t{4 * kLine - 1});
  }

 private:
  std::vector<float> memory_;
};

// Memory of this thread, whatever is in it.
float* Scratch(Int size) {
  static thread_local Floats memory;
  return memory.Grow(size);
}

// --- vectors ---

inline Vector Load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

inline void Store(float* to, Vector v) { *reinterpret_cast<Vector*>(to) = v; }

// The first `lanes` floats of a vector, where it has more.
inline void StorePart(float* to, Vector v, Int lanes) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << lanes) - 1), reinterpret_cast<__m512>(v));
#else
  float part[kLanes];
  Store(part, v);
  for (Int i = 0; i < lanes; ++i) to[i] = part[i];
#endif
}

// Exchanges blocks of H × H of the rows a and b, H apart: one step of a transposition.
template <int H, int... K>
inline void Exchange(Vector& a, Vector& b, std::integer_sequence<int, K...>) {
  const Vector upper = __builtin_shufflevector(a, b, (K & H ? kLanes + K - H : K)...);
  b = __builtin_shufflevector(a, b, (K & H ? kLanes + K : K + H)...);
  a = upper;
}

template <int H>
inline void TransposeBlock(Vector* v) {
  if constexpr (H > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (!(i & H)) Exchange<H>(v[i], v[i | H], std::make_integer_sequence<int, kLanes>());
    TransposeBlock<H / 2>(v);
  }
}

// to[c · line + j] = from[j · step + c] for j < count, c < channels. Reads up to a vector beyond.
void Transpose(const float* from, Int step, Int count, Int channels, float* to, Int line) {
  for (Int c = 0; c < channels; c += kLanes)
    for (Int j = 0; j < count; j += kLanes) {
      Vector v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) v[i] = Load(from + std::min(j + i, count - 1) * step + c);
      TransposeBlock<kLanes / 2>(v);
      const Int most = std::min<Int>(kLanes, channels - c);
      if (count - j >= kLanes)
        for (Int i = 0; i < most; ++i) Store(to + (c + i) * line + j, v[i]);
      else
        for (Int i = 0; i < most; ++i) StorePart(to + (c + i) * line + j, v[i], count - j);
    }
}

// --- forward, and the gradient of the input ---

// M neighbouring outputs times N vectors of channels; `offsets` say where each tap begins in x.
template <int M, int N>
void Tile(const float* x, const Int* offsets, Int taps, Int inputs, Int line, const float* w, float* y, Int step,
          Int lanes) {
  Vector sums[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sums[m][n] = Vector{};
  for (Int t = 0; t < taps; ++t) {
    const float* at = x + offsets[t];
    for (Int c = 0; c < inputs; ++c, at += line, w += N * kLanes) {
      Vector k[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) k[n] = Load(w + n * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sums[m][n] += at[m] * k[n];
    }
  }
  if (lanes == N * kLanes) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) Store(y + m * step + n * kLanes, sums[m][n]);
    return;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    if (N > 1) Store(y + m * step, sums[m][0]);
    StorePart(y + m * step + (N - 1) * kLanes, sums[m][N - 1], lanes - (N - 1) * kLanes);
  }
}

// The same sums the other way round, for channels that do not fill vectors: N vectors of neighbouring outputs, of which
// `columns` are wanted, times M channels.
template <int M, int N>
void Across(const float* x, const Int* offsets, Int taps, Int inputs, Int line, const float* w, float* y, Int step,
            Int columns) {
  Vector sums[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sums[m][n] = Vector{};
  for (Int t = 0; t < taps; ++t) {
    const float* at = x + offsets[t];
    for (Int c = 0; c < inputs; ++c, at += line, w += M) {
      Vector v[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) v[n] = Load(at + n * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sums[m][n] += w[m] * v[n];
    }
  }
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    constexpr int kCount = (M + kLanes - 1) / kLanes * kLanes;
    Vector v[kCount] = {};
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) v[m] = sums[m][n];
    for (int first = 0; first < M; first += kLanes) {
      TransposeBlock<kLanes / 2>(v + first);
      const Int lanes = std::min(kLanes, M - first), most = std::min<Int>(kLanes, columns - n * kLanes);
      for (Int i = 0; i < most; ++i) StorePart(y + (n * kLanes + i) * step + first, v[first + i], lanes);
    }
  }
}

using TileFunction = decltype(&Tile<1, 1>);

template <int N, int... M>
TileFunction TileOf(bool across, Int m, std::integer_sequence<int, M...>) {
  static constexpr TileFunction tiles[] = {Tile<M + 1, N>...}, others[] = {Across<M + 1, N>...};
  return (across ? others : tiles)[m - 1];
}

// For m values that are broadcast and n vectors.
TileFunction TileOf(bool across, Int m, Int n) {
  return n == 1 ? TileOf<1>(across, m, std::make_integer_sequence<int, kWide1>())
                : TileOf<2>(across, m, std::make_integer_sequence<int, kWide2>());
}

// Some of the outputs' channels: one or two vectors of them, or as many as are broadcast.
struct Block {
  Int first, vectors, lanes;
};

std::vector<Block> BlocksOf(Int channels) {
  std::vector<Block> blocks;
  for (Int first = 0; first < channels; first += blocks.back().lanes) {
    const Int vectors = channels - first > kLanes ? 2 : 1;
    blocks.push_back({first, vectors, std::min(vectors * kLanes, channels - first)});
  }
  return blocks;
}

std::vector<Block> BlocksAcross(Int channels, Int columns) {
  std::vector<Block> blocks;
  const Int vectors = columns > kLanes ? 2 : 1, count = Ceil(channels, vectors == 1 ? kWide1 : kWide2);
  for (Int b = 0; b < count; ++b)
    blocks.push_back({b * channels / count, vectors, (b + 1) * channels / count - b * channels / count});
  return blocks;
}

// The kernel as tiles read it: (phase, block, tap, input, channels), and where each phase's block begins.
Floats Packed(const Plan& plan, const std::vector<Block>& blocks, bool across, const float* w, std::vector<Int>* begins) {
  Int size = 0;
  for (const Phase& phase : plan.phases)
    for (const Block& block : blocks) {
      begins->push_back(size);
      size += phase.taps.size() * plan.channels * (across ? block.lanes : block.vectors * kLanes);
      size = Ceil(size, kLine) * kLine;
    }
  Floats packed(size);
  size_t number = 0;
  for (const Phase& phase : plan.phases)
    for (const Block& block : blocks) {
      float* to = packed.data() + (*begins)[number++];
      for (const Tap& tap : phase.taps)
        for (Int c = 0; c < plan.channels; ++c, to += across ? block.lanes : block.vectors * kLanes) {
          const float* from = w + tap.kernel * plan.kernel_tap + c * plan.kernel_input + block.first * plan.kernel_output;
          for (Int o = 0; o < block.lanes; ++o) to[o] = from[o * plan.kernel_output];
        }
    }
  return packed;
}

void Correlate(ffi::ThreadPool& pool, const Plan& plan, const float* x, const float* w, float* y) {
  const Reach reach = ReachOf(plan);
  const Int low_h = reach.low_h, low_w = reach.low_w, high_h = reach.high_h, high_w = reach.high_w;
  const Int rows = reach.rows, columns = reach.columns;
  // Columns are sorted by their phase of the step, so that outputs side by side read numbers side by side.
  const Int part = columns + (high_w - low_w) / plan.step_w, line = part * plan.step_w, row = plan.channels * line;
  const Int span = high_h - low_h + 1, fit = std::max<Int>(1, (kBand / row - span) / plan.step_h + 1);
  const Int bands = Ceil(rows, std::min(fit, rows)), band = Ceil(rows, bands);

  // Vectors run over channels, or over columns where that takes fewer of them (and a tenth more to put in order).
  const Int channels = plan.out_channels;
  const bool across = 11 * channels * Ceil(columns, kLanes) < 10 * columns * Ceil(channels, kLanes);
  const std::vector<Block> blocks = across ? BlocksAcross(channels, columns) : BlocksOf(channels);
  std::vector<Int> begins;
  Floats kernel = Packed(plan, blocks, across, w, &begins);
  const float* packed = kernel.data();
  std::vector<std::vector<Int>> offsets;
  for (const Phase& phase : plan.phases) {
    offsets.emplace_back();
    for (const Tap& tap : phase.taps) {
      const Int column = tap.column - low_w;
      offsets.back().push_back((tap.row - low_h) * row + (column % plan.step_w) * part + column / plan.step_w);
    }
  }

  const float* end_of_x = x + plan.images * plan.height * plan.width * plan.channels;
  const auto read = [&](Int image, Int number, float* to) {  // a row of the image, with what is beside it
    std::memset(to, 0, sizeof(float) * row);
    if (number < 0 || number >= plan.height) return;
    const float* from = x + (image * plan.height + number) * plan.width * plan.channels;
    for (Int f = 0; f < plan.step_w; ++f) {
      const Int skip = std::max<Int>(0, Ceil(-low_w - f, plan.step_w)), begin = f + skip * plan.step_w + low_w;
      const Int count = std::min(Ceil(plan.width - begin, plan.step_w), part - skip);
      const Int step = plan.step_w * plan.channels;
      if (begin >= plan.width || count <= 0) continue;
      const float* source = from + begin * plan.channels;
      float* at = to + f * part + skip;
      if (source + (count - 1) * step + Ceil(plan.channels, kLanes) * kLanes <= end_of_x) {
        Transpose(source, step, count, plan.channels, at, line);
        continue;
      }
      for (Int j = 0; j < count; ++j)
        for (Int c = 0; c < plan.channels; ++c) at[c * line + j] = source[j * step + c];
    }
  };

  Parallel(pool, plan.images * bands, [&](Int job) {
    const Int image = job / bands, first = job % bands * band, end = std::min(first + band, rows);
    if (end <= first) return;
    const Int needed = (end - first - 1) * plan.step_h + span;
    float* z = Scratch(needed * row);
    for (Int r = 0; r < needed; ++r) read(image, first * plan.step_h + low_h + r, z + r * row);
    for (size_t p = 0; p < plan.phases.size(); ++p) {
      const Phase& phase = plan.phases[p];
      for (size_t b = 0; b < blocks.size(); ++b) {
        const Block& block = blocks[b];
        const Int at_once = block.vectors * kLanes;
        const Int tiles = Ceil(phase.columns, across ? at_once : block.vectors == 1 ? kWide1 : kWide2);
        for (Int i = first; i < std::min(end, phase.rows); ++i) {
          const Int at = (image * plan.out_h + phase.first_h + i * plan.spread_h) * plan.out_w + phase.first_w;
          for (Int t = 0; t < tiles; ++t) {
            const Int from = across ? t * at_once : t * phase.columns / tiles;
            const Int to = across ? std::min(from + at_once, phase.columns) : (t + 1) * phase.columns / tiles;
            const Int vectors = across ? Ceil(to - from, kLanes) : block.vectors;
            TileOf(across, across ? block.lanes : to - from, vectors)(
                z + (i - first) * plan.step_h * row + from, offsets[p].data(), phase.taps.size(), plan.channels, line,
                packed + begins[p * blocks.size() + b], y + (at + from * plan.spread_w) * channels + block.first,
                plan.spread_w * channels, across ? to - from : block.lanes);
          }
        }
      }
    }
  });
}

void Forward(ffi::ThreadPool& pool, const Shape& s, const float* x, const float* w, float* y) {
  Correlate(pool, ForwardPlan(s), x, w, y);
}

void InputGradient(ffi::ThreadPool& pool, const Shape& s, const float* y, const float* w, float* x) {
  Correlate(pool, InputGradientPlan(s), y, w, x);
}

// --- the gradient of the kernel ---

// Adds to w the sums over rows of `count` positions of C inputs times N vectors of outputs.
template <int C, int N>
void Outer(const float* x, Int x_step, Int x_row, const float* y, Int y_step, Int y_row, Int rows, Int count, float* w,
           Int w_step) {
  Vector sums[C][N];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sums[c][n] = Load(w + c * w_step + n * kLanes);
  for (Int r = 0; r < rows; ++r, x += x_row, y += y_row) {
    const float *a = x, *b = y;
    for (Int i = 0; i < count; ++i, a += x_step, b += y_step) {
      Vector k[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) k[n] = Load(b + n * kLanes);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sums[c][n] += a[c] * k[n];
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) Store(w + c * w_step + n * kLanes, sums[c][n]);
}

using OuterFunction = decltype(&Outer<1, 1>);

template <int N, int... C>
OuterFunction OuterOf(Int c, std::integer_sequence<int, C...>) {
  static constexpr OuterFunction functions[] = {Outer<C + 1, N>...};
  return functions[c - 1];
}

OuterFunction OuterOf(Int c, Int n) {
  return n == 1 ? OuterOf<1>(c, std::make_integer_sequence<int, kWide1>())
                : OuterOf<2>(c, std::make_integer_sequence<int, kWide2>());
}

// The sum over some images of one block of outputs: (taps, inputs, lanes).
void PartOfKernel(const Shape& s, const Block& block, Int first, Int last, const float* x, const float* y, float* total) {
  const Int span_h = (s.taps_h - 1) * s.dilation_h + 1, span_w = (s.taps_w - 1) * s.dilation_w + 1;
  const Int columns = (s.out_w - 1) * s.stride_w + span_w, wide = block.vectors * kLanes;
  const Int some = std::max(kRows / (s.out_w * std::max(wide, s.inputs)), Ceil(kPositions, s.out_w));
  const Int rows = std::min(some, s.out_h), tiles = Ceil(s.inputs, block.vectors == 1 ? kWide1 : kWide2);
  const bool within = s.pad_h == 0 && s.pad_w == 0 && columns <= s.width &&
                      (s.out_h - 1) * s.stride_h + span_h <= s.height;  // no window reaches beyond the image
  const bool whole = wide == s.outputs;
  const Int line = (within ? s.width : columns) * s.inputs;
  const Int size_x = within ? 0 : Ceil(((rows - 1) * s.stride_h + span_h) * line, kLine) * kLine;
  float* padded = Scratch(size_x + (whole ? 0 : rows * s.out_w * wide));
  float* own = padded + size_x;
  const Int begin = std::max<Int>(0, -s.pad_w), end = std::min(s.width, columns - s.pad_w);

  const auto read = [&](Int image, Int number, float* to) {  // a row of the image, with what is beside it
    const bool inside = number >= 0 && number < s.height && begin < end;
    const Int before = inside ? (begin + s.pad_w) * s.inputs : line, size = inside ? (end - begin) * s.inputs : 0;
    std::memset(to, 0, sizeof(float) * before);
    if (!inside) return;
    std::memcpy(to + before, x + ((image * s.height + number) * s.width + begin) * s.inputs, sizeof(float) * size);
    std::memset(to + before + size, 0, sizeof(float) * (line - before - size));
  };

  for (Int image = first; image < last; ++image)
    for (Int i = 0; i < s.out_h; i += rows) {
      const Int count = std::min(rows, s.out_h - i), needed = (count - 1) * s.stride_h + span_h;
      const float* z = within ? x + (image * s.height + i * s.stride_h) * line : padded;
      for (Int r = 0; !within && r < needed; ++r) read(image, i * s.stride_h + r - s.pad_h, padded + r * line);
      const float* given = y + (image * s.out_h + i) * s.out_w * s.outputs + block.first;
      for (Int j = 0; !whole && j < count * s.out_w; ++j) {
        std::memcpy(own + j * wide, given + j * s.outputs, sizeof(float) * block.lanes);
        std::memset(own + j * wide + block.lanes, 0, sizeof(float) * (wide - block.lanes));
      }
      for (Int k = 0; k < s.taps_h; ++k)
        for (Int l = 0; l < s.taps_w; ++l)
          for (Int t = 0; t < tiles; ++t) {
            const Int from = t * s.inputs / tiles, to = (t + 1) * s.inputs / tiles;
            OuterOf(to - from, block.vectors)(z + k * s.dilation_h * line + l * s.dilation_w * s.inputs + from,
                                              s.stride_w * s.inputs, s.stride_h * line, whole ? given : own, wide,
                                              s.out_w * wide, count, s.out_w,
                                              total + ((k * s.taps_w + l) * s.inputs + from) * wide, wide);
          }
    }
}

void KernelGradient(ffi::ThreadPool& pool, const Shape& s, const float* x, const float* y, float* w) {
  const std::vector<Block> blocks = BlocksOf(s.outputs);
  const Int rows = s.taps_h * s.taps_w * s.inputs, count = blocks.size();
  const Int wide = count * 2 * kLanes, size = rows * wide;  // of all blocks, at most
  const Int parts = std::clamp<Int>(std::min(Ceil(kParts, count), kPartial / size), 1, s.images);
  Floats memory(size * parts);
  float* totals = memory.data();
  const auto at = [&](Int part, Int block) { return totals + part * size + block * rows * 2 * kLanes; };
  Parallel(pool, parts * count, [&](Int job) {
    const Int part = job / count, block = job % count;
    PartOfKernel(s, blocks[block], part * s.images / parts, (part + 1) * s.images / parts, x, y, at(part, block));
  });
  Parallel(pool, count, [&](Int b) {
    const Block& block = blocks[b];
    for (Int k = 0; k < rows; ++k)
      for (Int o = 0; o < block.lanes; ++o) {
        float sum = 0;
        for (Int part = 0; part < parts; ++part) sum += at(part, b)[k * block.vectors * kLanes + o];
        w[k * s.outputs + block.first + o] = sum;
      }
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kdsearch_forward, (Run<ffi::F32, float, Forward>), Binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kdsearch_input_gradient, (Run<ffi::F32, float, InputGradient>), Binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kdsearch_kernel_gradient, (Run<ffi::F32, float, KernelGradient>), Binding<ffi::F32>());
