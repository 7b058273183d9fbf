/// The one exception type of the native library.
///
/// Every failure that may reach JavaScript is an Error. The code selects the JavaScript error class. The message is written for the person
/// who has to fix the input, not for the author of the library.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace uniflow {

/// The kind of failure; part of the public interface, see name_of().
enum class ErrorCode { BadInput, BadCheckpoint, Unsupported, OutOfMemory, Aborted, Disposed, Internal };

/// The stable spelling that callers compare against (`error.code` in JavaScript).
inline const char* name_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::BadInput: return "BAD_INPUT";
    case ErrorCode::BadCheckpoint: return "BAD_CHECKPOINT";
    case ErrorCode::Unsupported: return "UNSUPPORTED";
    case ErrorCode::OutOfMemory: return "OUT_OF_MEMORY";
    case ErrorCode::Aborted: return "ABORTED";
    case ErrorCode::Disposed: return "DISPOSED";
    case ErrorCode::Internal: return "INTERNAL";
  }
  return "INTERNAL";
}

/// A failure with a code and, if it has them, its three parts.
///
/// The parts are stored beside the composed message, so a caller can report them without parsing text. They are empty for a free-form
/// message.
class [[gnu::visibility("default")]] Error : public std::runtime_error {
 public:
  /// A check that failed: `<subject>: expected <expected>, but got <actual>`.
  Error(ErrorCode error_code, std::string what_was_checked, std::string what_was_expected, std::string what_came)
      : std::runtime_error(what_was_checked + ": expected " + what_was_expected + ", but got " + what_came),
        code(error_code),
        subject(std::move(what_was_checked)),
        expected(std::move(what_was_expected)),
        actual(std::move(what_came)) {}

  /// A failure without an expectation: out of memory, aborted, disposed.
  Error(ErrorCode error_code, const std::string& message) : std::runtime_error(message), code(error_code) {}

  /// The same failure, with the op in which it happened.
  Error in_op(const char* name) const {
    Error named(*this);
    if (named.op.empty()) named.op = name;
    return named;
  }

  ErrorCode code;
  std::string op;  ///< set for failures inside a queued op
  std::string subject;
  std::string expected;
  std::string actual;
};

}  // namespace uniflow
