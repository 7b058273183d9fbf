/// A strict, event-based JSON reader (RFC 8259). It builds no document, and the receiver may reject the text at any point.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace uniflow {

/// Receives the events in the order of the text. Any of these may throw, which ends the reading.
class JsonEvents {
 public:
  virtual void begin_object() = 0;
  virtual void key(std::string name) = 0;
  virtual void end_object() = 0;
  virtual void begin_array() = 0;
  virtual void end_array() = 0;
  virtual void string(std::string value) = 0;
  /// The number as written: "-1", "2.0", "8e0".
  virtual void number(std::string_view text) = 0;
  /// true, false or null.
  virtual void literal(std::string_view text) = 0;

 protected:
  ~JsonEvents() = default;
};

/// The text is not JSON or not UTF-8. The message names the byte and the problem.
class JsonError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Reads one value, surrounded by nothing but white space. Names may repeat; `events` decides whether to accept that.
void read_json(std::string_view text, JsonEvents& events);

}  // namespace uniflow
