/// A strict reader of JSON (RFC 8259), by events: what is read is never stored twice, and who receives it can refuse at any point.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace uniflow {

/// What comes, in the order of the text. Any of these may throw, which ends the reading.
class JsonEvents {
 public:
  virtual void begin_object() = 0;
  virtual void key(std::string name) = 0;
  virtual void end_object() = 0;
  virtual void begin_array() = 0;
  virtual void end_array() = 0;
  virtual void string(std::string value) = 0;
  /// As it is spelled: "-1", "2.0", "8e0".
  virtual void number(std::string_view text) = 0;
  /// true, false or null.
  virtual void literal(std::string_view text) = 0;

 protected:
  ~JsonEvents() = default;
};

/// The text is not JSON, or not UTF-8. The message says what is at which byte.
class JsonError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// One value, with nothing but white space before and after it. Names may repeat: `events` decides.
void read_json(std::string_view text, JsonEvents& events);

}  // namespace uniflow
