#include "convert.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "dropout.h"
#include "features.h"
#include "isa.h"

namespace lowrank_ext::cpu {
namespace {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

constexpr int64_t kElementGrain = 32768;  // about 10 us of work, worth a thread

template <typename Dst, typename Src>
using acc_t =
    std::conditional_t<std::is_same_v<Dst, double> || std::is_same_v<Src, double>, double, float>;

template <typename Dst, typename Src, bool kAdd>
void row_portable(Dst* dst, const Src* src, double scale, const uint64_t* bits, int64_t n) {
  using Acc = acc_t<Dst, Src>;
  const Acc factor = static_cast<Acc>(scale);
  for (int64_t i = 0; i < n; ++i) {
    const bool kept = bits == nullptr || (bits[i / 64] >> (i % 64) & 1);
    Acc value = kept ? factor * static_cast<Acc>(src[i]) : Acc{0};
    if constexpr (kAdd) value += static_cast<Acc>(dst[i]);
    dst[i] = static_cast<Dst>(value);
  }
}

#if LOWRANK_EXT_X86

LOWRANK_EXT_AVX512 inline __m512 load16(const float* p, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, p);
}
LOWRANK_EXT_AVX512 inline __m512 load16(const Half* p, __mmask16 lanes) {
  return _mm512_maskz_cvtph_ps(lanes, _mm256_maskz_loadu_epi16(lanes, p));
}
LOWRANK_EXT_AVX512 inline __m512 load16(const BFloat16* p, __mmask16 lanes) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

LOWRANK_EXT_AVX512 inline void store16(float* p, __mmask16 lanes, __m512 v) {
  _mm512_mask_storeu_ps(p, lanes, v);
}
LOWRANK_EXT_AVX512 inline void store16(Half* p, __mmask16 lanes, __m512 v) {
  _mm256_mask_storeu_epi16(p, lanes, _mm512_maskz_cvtps_ph(lanes, v, _MM_FROUND_TO_NEAREST_INT));
}
LOWRANK_EXT_AVX512 inline void store16(BFloat16* p, __mmask16 lanes, __m512 v) {
  // Round to nearest even by integer arithmetic; NaN keeps a quiet NaN, which the addition could
  // lose.
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  rounded = _mm512_srli_epi32(rounded, 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_set1_epi32(rounded, is_nan, 0x7FC0);
  _mm256_mask_storeu_epi16(p, lanes, _mm512_maskz_cvtepi32_epi16(lanes, rounded));
}

template <typename Dst, typename Src, bool kAdd>
LOWRANK_EXT_AVX512 void row_avx512(Dst* dst, const Src* src, double scale, const uint64_t* bits,
                                   int64_t n) {
  const __m512 factor = _mm512_set1_ps(static_cast<float>(scale));
  for (int64_t i = 0; i < n; i += 16) {
    const auto lanes = static_cast<__mmask16>(n - i >= 16 ? 0xFFFF : (1 << (n - i)) - 1);
    const auto kept =
        bits == nullptr ? lanes : static_cast<__mmask16>(bits[i / 64] >> (i % 64)) & lanes;
    __m512 value = _mm512_mul_ps(factor, load16(src + i, static_cast<__mmask16>(kept)));
    if constexpr (kAdd) value = _mm512_add_ps(value, load16(dst + i, lanes));
    store16(dst + i, lanes, value);
  }
}

#endif  // LOWRANK_EXT_X86

template <typename Dst, typename Src, bool kAdd>
void row(Dst* dst, const Src* src, double scale, const uint64_t* bits, int64_t n) {
#if LOWRANK_EXT_X86
  if constexpr (std::is_same_v<acc_t<Dst, Src>, float>) {
    if (features().avx512) return row_avx512<Dst, Src, kAdd>(dst, src, scale, bits, n);
  }
#endif
  row_portable<Dst, Src, kAdd>(dst, src, scale, bits, n);
}

template <typename Visitor>
void visit_dtype(ScalarType dtype, void* data, const Visitor& visitor) {
  switch (dtype) {
    case ScalarType::Double:
      return visitor(static_cast<double*>(data));
    case ScalarType::Float:
      return visitor(static_cast<float*>(data));
    case ScalarType::BFloat16:
      return visitor(static_cast<BFloat16*>(data));
    case ScalarType::Half:
      return visitor(static_cast<Half*>(data));
    default:
      throw std::runtime_error("lowrank_ext: convert: dtype must be floating");
  }
}

// body(dst, src, row) with typed pointers and the row function of their types
template <bool kAdd, typename Body>
void visit_rows(Rows dst, Rows src, const Body& body) {
  visit_dtype(dst.dtype, dst.data, [&](auto* dst_data) {
    visit_dtype(src.dtype, src.data, [&](const auto* src_data) {
      body(dst_data, src_data,
           row<std::remove_pointer_t<decltype(dst_data)>,
               std::remove_const_t<std::remove_pointer_t<decltype(src_data)>>, kAdd>);
    });
  });
}

// Both matrices dense: a factor's rows of r elements are too short to be worth a call each.
template <bool kAdd>
void for_elements(Rows dst, Rows src, double scale, int64_t num_elements) {
  visit_rows<kAdd>(dst, src, [&](auto* dst_data, const auto* src_data, const auto& one_row) {
    torch::stable::parallel_for(0, num_elements, kElementGrain, [&](int64_t begin, int64_t end) {
      one_row(dst_data + begin, src_data + begin, scale, nullptr, end - begin);
    });
  });
}

template <bool kAdd>
void for_rows(Rows dst, Rows src, double scale, int64_t num_rows, int64_t num_cols,
              const uint64_t* bits) {
  if (num_cols == 0) return;
  if (bits == nullptr && num_cols < kElementGrain && dst.stride == num_cols &&
      src.stride == num_cols)
    return for_elements<kAdd>(dst, src, scale, num_rows * num_cols);
  const int64_t words_per_row = bits == nullptr ? 0 : mask_words_per_row(num_cols);
  const int64_t grain = std::max<int64_t>(1, kElementGrain / num_cols);
  visit_rows<kAdd>(dst, src, [&](auto* dst_data, const auto* src_data, const auto& one_row) {
    torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        one_row(dst_data + m * dst.stride, src_data + m * src.stride, scale,
                bits + m * words_per_row, num_cols);
    });
  });
}

}  // namespace

void convert(Rows dst, Rows src, double scale, int64_t num_rows, int64_t num_cols,
             const uint64_t* bits) {
  for_rows<false>(dst, src, scale, num_rows, num_cols, bits);
}

void accumulate(Rows dst, Rows src, double scale, int64_t num_rows, int64_t num_cols,
                const uint64_t* bits) {
  for_rows<true>(dst, src, scale, num_rows, num_cols, bits);
}

void convert_row(Rows dst, Rows src, double scale, int64_t num_cols, const uint64_t* bits) {
  visit_rows<false>(dst, src, [&](auto* dst_data, const auto* src_data, const auto& one_row) {
    one_row(dst_data, src_data, scale, bits, num_cols);
  });
}

void accumulate_row(Rows dst, Rows src, double scale, int64_t num_cols, const uint64_t* bits) {
  visit_rows<true>(dst, src, [&](auto* dst_data, const auto* src_data, const auto& one_row) {
    one_row(dst_data, src_data, scale, bits, num_cols);
  });
}

}  // namespace lowrank_ext::cpu
