// What the convolutions of all element types share: the shape of a call, how work is spread over threads, which outputs
// read which inputs, and the handlers of XLA's foreign function interface.

#ifndef KDSEARCH_CONVOLUTION_H_
#define KDSEARCH_CONVOLUTION_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Int = int64_t;

struct Shape {
  Int images, height, width, inputs, taps_h, taps_w, outputs, out_h, out_w;
  Int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

Int Ceil(Int a, Int b) { return (a + b - 1) / b; }

// Runs job(0), …, job(count − 1) on this thread, and on threads of the pool that happen to be free: this one never
// waits for work that nobody has begun, so that several such calls cannot wait for each other.
void Parallel(ffi::ThreadPool& pool, Int count, std::function<void(Int)> job) {
  const Int helpers = std::min<Int>(pool.num_threads(), count) - 1;
  if (helpers <= 0) {
    for (Int i = 0; i < count; ++i) job(i);
    return;
  }
  struct Work {
    std::function<void(Int)> job;
    Int count;
    std::atomic<Int> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
    void Run() {
      for (Int i; (i = next.fetch_add(1)) < count;) {
        job(i);
        if (done.fetch_add(1) + 1 == count) {
          std::lock_guard<std::mutex> lock(mutex);
          finished.notify_all();
        }
      }
    }
  };
  auto work = std::make_shared<Work>();
  work->job = std::move(job);
  work->count = count;
  for (Int i = 0; i < helpers; ++i) pool.Schedule([work] { work->Run(); });
  work->Run();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->finished.wait(lock, [&] { return work->done.load() == count; });
}

struct Tap {
  Int row, column, kernel;  // where it reads, seen from the first output; its number in the kernel
};

struct Phase {  // outputs at (first + i · spread), and the taps that meet them
  Int first_h, first_w, rows, columns;
  std::vector<Tap> taps;
};

struct Plan {
  Int images, height, width, channels;            // what is read
  Int out_h, out_w, out_channels;                 // what is written
  Int step_h, step_w, spread_h, spread_w;         // from one output to the next: in what is read, in what is written
  Int kernel_input, kernel_output, kernel_tap;    // steps in the kernel
  std::vector<Phase> phases;
};

// The values, as a correlation of x.
Plan ForwardPlan(const Shape& s) {
  Phase phase{0, 0, s.out_h, s.out_w, {}};
  for (Int k = 0; k < s.taps_h; ++k)
    for (Int l = 0; l < s.taps_w; ++l)
      phase.taps.push_back({k * s.dilation_h - s.pad_h, l * s.dilation_w - s.pad_w, k * s.taps_w + l});
  return {s.images, s.height, s.width, s.inputs, s.out_h, s.out_w, s.outputs, s.stride_h, s.stride_w, 1, 1,
          s.outputs, 1, s.inputs * s.outputs, {phase}};
}

// The gradient of the input, as a correlation of y for each phase of the stride, with the taps that meet it.
Plan InputGradientPlan(const Shape& s) {
  std::vector<Phase> phases;
  for (Int p = 0; p < std::min(s.stride_h, s.height); ++p)
    for (Int q = 0; q < std::min(s.stride_w, s.width); ++q) {
      Phase phase{p, q, Ceil(s.height - p, s.stride_h), Ceil(s.width - q, s.stride_w), {}};
      for (Int k = 0; k < s.taps_h; ++k)
        for (Int l = 0; l < s.taps_w; ++l) {
          const Int row = p + s.pad_h - k * s.dilation_h, column = q + s.pad_w - l * s.dilation_w;
          if (row % s.stride_h == 0 && column % s.stride_w == 0)
            phase.taps.push_back({row / s.stride_h, column / s.stride_w, k * s.taps_w + l});
        }
      phases.push_back(std::move(phase));
    }
  return {s.images, s.out_h, s.out_w, s.outputs, s.height, s.width, s.inputs, 1, 1, s.stride_h, s.stride_w, 1,
          s.outputs, s.inputs * s.outputs, std::move(phases)};
}

struct Reach {  // of a plan: the rows and columns that outputs read, seen from the first one; most outputs of a phase
  Int low_h = 0, high_h = 0, low_w = 0, high_w = 0, rows = 0, columns = 0;
};

Reach ReachOf(const Plan& plan) {
  Reach r;
  bool any = false;
  for (const Phase& phase : plan.phases) {
    r.rows = std::max(r.rows, phase.rows), r.columns = std::max(r.columns, phase.columns);
    for (const Tap& tap : phase.taps) {
      r.low_h = any ? std::min(r.low_h, tap.row) : tap.row, r.high_h = any ? std::max(r.high_h, tap.row) : tap.row;
      r.low_w = any ? std::min(r.low_w, tap.column) : tap.column;
      r.high_w = any ? std::max(r.high_w, tap.column) : tap.column;
      any = true;
    }
  }
  return r;
}

// --- for XLA ---

using Numbers = ffi::Span<const Int>;

template <ffi::DataType type, typename T, void (*function)(ffi::ThreadPool&, const Shape&, const T*, const T*, T*)>
ffi::Error Run(ffi::ThreadPool pool, ffi::Buffer<type> a, ffi::Buffer<type> b, ffi::Result<ffi::Buffer<type>> result,
               Numbers shape) {
  if (shape.size() != sizeof(Shape) / sizeof(Int)) return ffi::Error::InvalidArgument("shape: wrong length");
  Shape s;
  std::memcpy(&s, shape.begin(), sizeof s);
  const auto pointer = [](auto& buffer) { return static_cast<T*>(buffer.untyped_data()); };
  function(pool, s, pointer(a), pointer(b), pointer(*result));
  return ffi::Error::Success();
}

template <ffi::DataType type>
auto Binding() {
  using Array = ffi::Buffer<type>;
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .template Arg<Array>()
      .template Arg<Array>()
      .template Ret<Array>()
      .template Attr<Numbers>("shape");
}

}  // namespace

#endif  // KDSEARCH_CONVOLUTION_H_
