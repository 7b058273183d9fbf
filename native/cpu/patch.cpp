/// Conversions between pixels, patch vectors and tokens: unfold, fold, assemble, and resizing of position tables. All are memory-bound: the
/// roofline bound is the bytes read plus the bytes written.
#include <algorithm>
#include <cmath>
#include <vector>

#include "native/core/bicubic.h"
#include "native/core/parallel.h"
#include "native/cpu/kernels.h"
#include "native/cpu/simd.h"

namespace uniflow::cpu::UNIFLOW_ISA {
namespace {

template <class T>
void put(T* p, float v) {
  if constexpr (sizeof(T) == 2) *p = to_bf16(v);
  else *p = v;
}

/// One row of patches: [p, W, 3] pixels -> W/p patch vectors.
template <class T>
void unfold_uint8(const UnfoldArgs& a, const uint8_t* rows, T* out) {
  const int64_t p = a.patch, cols = a.width / p;
  for (int64_t c = 0; c < 3; ++c) {
    const float scale = 1.0f / (255.0f * a.std[c]), offset = -a.mean[c] / a.std[c];
    T table[256];  // a byte has 256 values, so normalising is an exact and cheap table lookup
    for (int v = 0; v < 256; ++v) put(table + v, static_cast<float>(v) * scale + offset);
    for (int64_t y = 0; y < p; ++y) {
      const uint8_t* in = rows + y * a.width * 3 + c;
      for (int64_t col = 0; col < cols; ++col) {
        T* o = out + col * 3 * p * p + c * p * p + y * p;
        for (int64_t x = 0; x < p; ++x) o[x] = table[in[(col * p + x) * 3]];
      }
    }
  }
}

template <class T>
void unfold_float(const UnfoldArgs& a, const float* image, int64_t row, T* out) {
  const int64_t p = a.patch, cols = a.width / p;
  for (int64_t c = 0; c < 3; ++c)
    for (int64_t y = 0; y < p; ++y) {
      const float* in = image + (c * a.height + row * p + y) * a.width;
      for (int64_t col = 0; col < cols; ++col) {
        T* o = out + col * 3 * p * p + c * p * p + y * p;
        for_lanes(p, [&](int64_t x, int lanes) { store_lanes(o + x, load_lanes(in + col * p + x, lanes), lanes); });
      }
    }
}

template <class T>
void unfold_all(const UnfoldArgs& a) {
  const int64_t p = a.patch, rows = a.height / p, per_row = (a.width / p) * 3 * p * p;
  parallel_for(a.batch * rows, [&](int64_t i) {
    T* out = static_cast<T*>(a.out) + i * per_row;
    const int64_t image = i / rows, row = i % rows;
    if (a.pixel_dtype == DType::UInt8) {
      unfold_uint8(a, static_cast<const uint8_t*>(a.pixels) + (image * a.height + row * p) * a.width * 3, out);
    } else {
      unfold_float(a, static_cast<const float*>(a.pixels) + image * 3 * a.height * a.width, row, out);
    }
  });
}

uint8_t to_byte(float v) { return static_cast<uint8_t>(std::min(std::max(0.0f, v), 255.0f) + 0.5f); }

template <class T>
void assemble_all(const AssembleArgs& a) {
  const int64_t tokens = a.prefix_count + a.patch_count;
  parallel_for(a.batch * tokens, [&](int64_t i) {
    const int64_t image = i / tokens, token = i % tokens - a.prefix_count;
    T* out = static_cast<T*>(a.out) + i * a.width;
    if (token < 0) {
      const float* in = a.prefix + (token + a.prefix_count) * a.width;
      for_lanes(a.width, [&](int64_t k, int lanes) { store_lanes(out + k, load_lanes(in + k, lanes), lanes); });
      return;
    }
    const T* in = static_cast<const T*>(a.patches) + (image * a.patch_count + token) * a.width;
    const float* position = a.position ? a.position + token * a.width : nullptr;
    for_lanes(a.width, [&](int64_t k, int lanes) {
      vf v = load_lanes(in + k, lanes);
      if (position) v += load_lanes(position + k, lanes);
      store_lanes(out + k, v, lanes);
    });
  });
}

}  // namespace

void unfold(const UnfoldArgs& a) {
  dispatch_float(a.dtype, [&]<class T> { unfold_all<T>(a); });
}

void fold(const FoldArgs& a) {
  const int64_t p = a.patch, cols = a.width / p, per_image = (a.height / p) * cols;
  parallel_for(a.rows, [&](int64_t r) {
    const int64_t image = (a.first + r) / per_image, n = (a.first + r) % per_image;
    const int64_t top = (n / cols) * p, left = (n % cols) * p;
    const float* in = a.patches + r * 3 * p * p;
    for (int64_t c = 0; c < 3; ++c)
      for (int64_t y = 0; y < p; ++y) {
        const float* row = in + (c * p + y) * p;
        if (a.pixel_dtype == DType::UInt8) {
          uint8_t* out = static_cast<uint8_t*>(a.pixels) + ((image * a.height + top + y) * a.width + left) * 3 + c;
          const float scale = 255.0f * a.std[c], offset = 255.0f * a.mean[c];
          for (int64_t x = 0; x < p; ++x) out[x * 3] = to_byte(row[x] * scale + offset);
        } else {
          float* out = static_cast<float*>(a.pixels) + ((image * 3 + c) * a.height + top + y) * a.width + left;
          std::copy(row, row + p, out);
        }
      }
  });
}

void assemble(const AssembleArgs& a) {
  dispatch_float(a.dtype, [&]<class T> { assemble_all<T>(a); });
}

void resize_table(const ResizeTableArgs& a) {
  const auto taps = a.antialias ? antialiased_taps : plain_taps;
  parallel_for(a.out_rows * a.out_cols, [&](int64_t i) {
    const std::vector<Tap> rows = taps(i / a.out_cols, a.in_rows, a.out_rows);
    const std::vector<Tap> cols = taps(i % a.out_cols, a.in_cols, a.out_cols);
    float* out = a.out + i * a.width;
    for_lanes(a.width, [&](int64_t k, int lanes) {
      vf v = {};
      for (const Tap& y : rows) {
        vf line = {};
        for (const Tap& x : cols) line += x.weight * load_lanes(a.in + (y.index * a.in_cols + x.index) * a.width + k, lanes);
        v += y.weight * line;
      }
      store_lanes(out + k, v, lanes);
    });
  });
}

void resize_table_backward(const ResizeTableArgs& a) {
  const auto taps = a.antialias ? antialiased_taps : plain_taps;
  constexpr int64_t kColumns = 64;  // a task owns some columns and sums over the grid in order
  parallel_for((a.width + kColumns - 1) / kColumns, [&](int64_t block) {
    const int64_t begin = block * kColumns, n = std::min(kColumns, a.width - begin);
    for (int64_t i = 0; i < a.in_rows * a.in_cols; ++i) std::fill_n(a.out + i * a.width + begin, n, 0.0f);
    for (int64_t i = 0; i < a.out_rows * a.out_cols; ++i) {
      const std::vector<Tap> rows = taps(i / a.out_cols, a.in_rows, a.out_rows), cols = taps(i % a.out_cols, a.in_cols, a.out_cols);
      const float* grad = a.in + i * a.width + begin;
      for (const Tap& y : rows)
        for (const Tap& x : cols) {
          float* out = a.out + (y.index * a.in_cols + x.index) * a.width + begin;
          const float w = y.weight * x.weight;
          for_lanes(n, [&](int64_t k, int lanes) { store_lanes(out + k, load_lanes(out + k, lanes) + w * load_lanes(grad + k, lanes), lanes); });
        }
    }
  });
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
