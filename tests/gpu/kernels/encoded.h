// Dispatches whose kernels encode the rows: their results on all ranks, and what these must hold. kernels.cu and
// low_latency.cu share it besides ranks.h.
#pragma once

#include <array>

#include "device/quantize.cuh"
#include "ranks.h"

namespace jax_ep {

// A row of x in a wire format, by quantize.cuh's lanes one after another; tests/test_formats.py holds those to the
// reference.
template <Wire kWire, class T>
void EncodeOnHost(const char* row, int hidden, char* values, char* scales) {
  constexpr int kLanesAGroup = GroupColumns(kWire) / kLaneColumns;
  for (int step = 0; step * kStepColumns < hidden; ++step) {
    for (int first = 0; first < 32; first += kLanesAGroup) {
      std::vector<LaneEncoder<kWire, T>> lanes;
      uint32_t amax = 0;
      for (int lane = first; lane < first + kLanesAGroup; ++lane) {
        lanes.emplace_back(row, hidden, values, scales, lane, step);
        lanes.back().template Load<false>();
        amax = Greater(amax, lanes.back().Amax());
      }
      for (auto& lane : lanes) lane.template Store<false>(amax);
    }
  }
}

template <Wire kWire>
void EncodeOnHost(RowDtype dtype, const char* row, int hidden, char* values, char* scales) {
  if (dtype == RowDtype::kBfloat16) return EncodeOnHost<kWire, __nv_bfloat16>(row, hidden, values, scales);
  if (dtype == RowDtype::kFloat16) return EncodeOnHost<kWire, __half>(row, hidden, values, scales);
  EncodeOnHost<kWire, float>(row, hidden, values, scales);
}

inline void EncodeOnHost(Wire wire, RowDtype dtype, const char* row, int hidden, char* values, char* scales) {
  if (wire == Wire::kFp8) return EncodeOnHost<Wire::kFp8>(dtype, row, hidden, values, scales);
  if (wire == Wire::kFp8Ue8m0) return EncodeOnHost<Wire::kFp8Ue8m0>(dtype, row, hidden, values, scales);
  EncodeOnHost<Wire::kMxfp8>(dtype, row, hidden, values, scales);
}

// Results of a case's dispatch of x [R] in a wire format; everything else is that of the dispatch without one.
class EncodedResults {
 public:
  EncodedResults(const Case& c, Wire wire, const std::vector<std::vector<char>>& x,
                 const std::vector<std::unique_ptr<Memory>>& memory)
      : c_(c),
        wire_(wire),
        scale_bytes_(int64_t{NumGroups(wire, static_cast<int>(c.hidden))} * ScaleBytes(wire)),
        bytes_{c.hidden, scale_bytes_} {
    for (const auto& of : memory) {
      recv_.push_back({of->Make<char>(c.capacity * c.hidden, 0xab), of->Make<char>(c.capacity * scale_bytes_, 0xab)});
    }
    for (const auto& rows : x) {
      values_.emplace_back(c.num_tokens * c.hidden);
      scales_.emplace_back(c.num_tokens * scale_bytes_);
      for (int64_t t = 0; t < c.num_tokens; ++t) {
        EncodeOnHost(wire, c.dtype, &rows[t * c.row_bytes()], static_cast<int>(c.hidden), &values_.back()[t * c.hidden],
                     &scales_.back()[t * scale_bytes_]);
      }
    }
  }

  // The same call of rank r, whose x is on the device, encoded.
  DispatchParams Of(int r, DispatchParams d, const char* x) const {
    d.num_row_arrays = 2;
    for (int i = 0; i < 2; ++i) d.rows[i] = {nullptr, recv_[r][i], bytes_[i]};
    d.encoding = {x, c_.dtype, static_cast<int>(wire_), static_cast<int>(c_.hidden)};
    return d;
  }

  void Poison(const Ranks& ranks) const {
    for (int r = 0; r < c_.num_ranks; ++r) {
      CHECK_CUDA(cudaSetDevice(ranks.device[r]));
      for (int i = 0; i < 2; ++i) CHECK_CUDA(cudaMemset(recv_[r][i], 0xab, c_.capacity * bytes_[i]));
      CHECK_CUDA(cudaDeviceSynchronize());
    }
  }

  bool AreRight(const Ranks& ranks, const std::vector<RankRouting>& routing) const {
    bool ok = true;
    for (int r = 0; r < c_.num_ranks; ++r) {
      if (ranks.IsAbsent(r)) continue;
      CHECK_CUDA(cudaSetDevice(ranks.device[r]));
      ok &= Same("encoded values", r, recv_[r][0], ReceivedRows(c_, routing, r, c_.hidden, values_), c_.hidden);
      ok &= Same("encoded scales", r, recv_[r][1], ReceivedRows(c_, routing, r, scale_bytes_, scales_), scale_bytes_);
    }
    return ok;
  }

  bool AreZero(const Ranks& ranks, int r) const {
    CHECK_CUDA(cudaSetDevice(ranks.device[r]));
    bool ok = true;
    for (int i = 0; i < 2; ++i)
      ok &= Same("encoded result after a timeout", r, recv_[r][i], std::vector<char>(c_.capacity * bytes_[i], 0));
    return ok;
  }

 private:
  Case c_;
  Wire wire_;
  int64_t scale_bytes_;
  std::array<int64_t, 2> bytes_;  // of a row of each array
  std::vector<std::array<char*, 2>> recv_;
  std::vector<std::vector<char>> values_, scales_;  // of x, by rank
};

}  // namespace jax_ep
