// device/logfmt.cuh on the host, the lanes of a warp one after another: what formats.cu holds to the reference, and
// low_latency.cu's oracle.
#pragma once

#include <cstring>

#include "device/logfmt.cuh"

namespace jax_ep {

// 1024 columns of a row as a warp makes them.
template <class T>
struct LogfmtStep {
  uint32_t codes[32][kLogfmtLaneWords];
  bool encoded[32];
  LogfmtLane<T> arrived[32];  // decoded, or as it was
};

// A lane's columns of a row in global memory; how many of them are in the row.
template <class T>
__host__ __device__ inline int LoadLogfmtLane(const char* row, int hidden, int step, int lane, LogfmtLane<T>* words) {
  const int first = step * kStepColumns + lane * kLaneColumns;
  int columns = hidden - first;
  columns = columns < 0 ? 0 : columns > kLaneColumns ? kLaneColumns : columns;
  const auto* from = reinterpret_cast<const uint32_t*>(row + first * static_cast<int64_t>(sizeof(T)));
  for (int i = 0; i < LogfmtLane<T>::kWords; ++i) words->x[i] = i * LogfmtLane<T>::kPerWord < columns ? from[i] : 0;
  return columns;
}

template <class T>
void LogfmtOnHost(const char* row, int hidden, int step, LogfmtStep<T>* out) {
  struct Tables {
    LogTable logs;
    ExpTable exps;
    Tables() {
      for (int i = 0; i < 128; ++i) {
        for (auto& entry : logs.entry[i]) entry = LogTable::Entry(i);
        for (auto& entry : exps.entry[i]) entry = ExpTable::Entry(i);
      }
    }
  };
  static const Tables* const tables = new Tables;
  uint32_t amax[32], amin[32];
  int columns[32];
  for (int i = 0; i < 32; ++i) {
    columns[i] = LoadLogfmtLane(row, hidden, step, i, &out->arrived[i]);
    out->arrived[i].Extremes(columns[i], &amax[i], &amin[i]);
  }
  for (int i = 0; i < 32; i += 4) {
    for (int j = 0; j < 4; ++j) amax[i] = Greater(amax[i], amax[i + j]), amin[i] = Lesser(amin[i], amin[i + j]);
    for (int j = 1; j < 4; ++j) amax[i + j] = amax[i], amin[i + j] = amin[i];
  }
  for (int i = 0; i < 32; ++i) {
    bool encoded = true;
    for (int j = 0; j < 32; ++j) {
      if (LogfmtPieceColumns(hidden) == 512 && i / 16 != j / 16) continue;
      if (columns[j / 4 * 4] == 0) continue;
      encoded = encoded && amax[j] < kF32One && LogScaleOf(tables->logs, j, amax[j], amin[j]).range > 0;
    }
    out->encoded[i] = encoded;
    if (!encoded || columns[i] == 0) continue;
    const LogScale scale = LogScaleOf(tables->logs, i, amax[i], amin[i]);
    out->arrived[i].Encode(tables->logs, i, CodeRuleOf(scale), out->codes[i]);
    out->arrived[i].Decode(tables->exps, i % ExpTable::kCopies, ValueRuleOf(scale), out->codes[i]);
  }
}

// What arrives of a row, in its place.
template <class T>
void LogfmtRoundtrip(char* row, int hidden) {
  for (int first = 0; first < hidden; first += kStepColumns) {
    LogfmtStep<T> step;
    LogfmtOnHost(row, hidden, first / kStepColumns, &step);
    const int columns = hidden - first < kStepColumns ? hidden - first : kStepColumns;
    std::memcpy(row + first * sizeof(T), step.arrived, columns * sizeof(T));
  }
}

}  // namespace jax_ep
