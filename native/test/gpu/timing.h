/// The benchmark of uniflow_gpu_check: what the device can do at best, and the table of what is timed with time_gpu.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "native/test/gpu/gpu.h"

namespace uniflow::test {

/// Rates reached by the device: FLOP/s of a large product in either type, bytes (read + written) a second of a copy.
struct Yardsticks {
  double bfloat16, float32, copy;
};
Yardsticks measure_yardsticks();
std::string to_text(const Yardsticks& y);
nlohmann::json to_json(const Yardsticks& y);

/// Prints the table's head. Rows are held against `yardsticks`; `wanted` is asked for each, with "family name dtype".
void begin_table(const Yardsticks& yardsticks, std::function<bool(const std::string&)> wanted);
/// Rows from now on are of this family.
void begin_family(const std::string& family);
/// Whether a row of this family is wanted: for rows that are not timed with time_gpu.
bool row_wanted(const std::string& name, DType dtype);
/// A row of another kind: `figures` go into the JSON, `note` into the table.
void add_row(const std::string& name, DType dtype, double median_ms, nlohmann::json figures, const std::string& note);
/// The rows so far, in the fields of bench/harness.ts.
const nlohmann::json& table_rows();

}  // namespace uniflow::test
