#include "native/core/json.h"

#include <cstdint>

namespace uniflow {
namespace {

constexpr int kDeepest = 64;  // levels of nesting

bool is_digit(int c) { return c >= '0' && c <= '9'; }

class Reader {
 public:
  Reader(std::string_view text, JsonEvents& events) : text_(text), events_(events) {}

  void document() {
    value(0);
    space();
    if (at_ != text_.size()) fail();
  }

 private:
  /// The next byte; -1 at the end.
  int peek() const { return at_ < text_.size() ? static_cast<unsigned char>(text_[at_]) : -1; }

  [[noreturn]] void fail() const {
    const int c = peek();
    const std::string what = c < 0 ? "the end of the text" : c == 0 ? "a zero byte" : std::string("an unexpected '") + static_cast<char>(c) + "'";
    throw JsonError(what + " at byte " + std::to_string(at_));
  }

  bool take(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!take(c)) fail();
  }
  void space() {
    while (peek() == ' ' || peek() == '\n' || peek() == '\r' || peek() == '\t') ++at_;
  }

  void value(int depth) {
    if (depth == kDeepest) throw JsonError("deeper nesting than " + std::to_string(kDeepest) + " at byte " + std::to_string(at_));
    space();
    switch (peek()) {
      case '{': return object(depth);
      case '[': return array(depth);
      case '"': return events_.string(string());
      case 't': return literal("true");
      case 'f': return literal("false");
      case 'n': return literal("null");
      default: return number();
    }
  }

  void object(int depth) {
    events_.begin_object();
    list('}', [&] {
      space();
      events_.key(string());
      space();
      expect(':');
      value(depth + 1);
    });
    events_.end_object();
  }

  void array(int depth) {
    events_.begin_array();
    list(']', [&] { value(depth + 1); });
    events_.end_array();
  }

  template <class Item>
  void list(char end, Item item) {
    ++at_;
    space();
    if (take(end)) return;
    do {
      item();
      space();
    } while (take(','));
    expect(end);
  }

  void literal(std::string_view text) {
    for (const char c : text) expect(c);
    events_.literal(text);
  }

  void digits() {
    if (!is_digit(peek())) fail();
    while (is_digit(peek())) ++at_;
  }

  void number() {
    const size_t begin = at_;
    take('-');
    if (!take('0')) digits();
    if (take('.')) digits();
    if (take('e') || take('E')) {
      if (!take('+')) take('-');
      digits();
    }
    events_.number(text_.substr(begin, at_ - begin));
  }

  std::string string() {
    std::string out;
    expect('"');
    while (!take('"')) {
      if (take('\\')) {
        escape(out);
      } else {
        const size_t length = character();
        out += text_.substr(at_, length);
        at_ += length;
      }
    }
    return out;
  }

  /// Length in bytes of the UTF-8 character here (Unicode 15, table 3-7).
  size_t character() const {
    const int first = peek();
    if (first < 0x20) fail();  // control characters must be escaped
    if (first < 0x80) return 1;
    const size_t length = first < 0xC2 || first > 0xF4 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    bool valid = length > 0 && text_.size() - at_ >= length;
    for (size_t i = 1; valid && i < length; ++i) {
      const int byte = static_cast<unsigned char>(text_[at_ + i]);
      const int low = i > 1 ? 0x80 : first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
      const int high = i > 1 ? 0xBF : first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
      valid = byte >= low && byte <= high;
    }
    if (!valid) throw JsonError("no UTF-8 at byte " + std::to_string(at_));
    return length;
  }

  void escape(std::string& out) {
    constexpr std::string_view kNames = "\"\\/bfnrt", kValues = "\"\\/\b\f\n\r\t";
    const int c = peek();
    if (c == 'u') return append_utf8(out, code_point());
    const size_t found = c < 0 ? kNames.npos : kNames.find(static_cast<char>(c));
    if (found == kNames.npos) fail();
    ++at_;
    out += kValues[found];
  }

  /// u0041, or u and both halves of a surrogate pair.
  uint32_t code_point() {
    const uint32_t first = hex();
    if (first < 0xD800 || first > 0xDFFF) return first;
    if (first > 0xDBFF || !take('\\') || peek() != 'u') throw JsonError("half a surrogate pair at byte " + std::to_string(at_));
    const uint32_t second = hex();
    if (second < 0xDC00 || second > 0xDFFF) throw JsonError("half a surrogate pair at byte " + std::to_string(at_));
    return 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
  }

  uint32_t hex() {
    expect('u');
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const int c = peek(), letter = c | 0x20;
      if (!is_digit(c) && (letter < 'a' || letter > 'f')) fail();
      out = out << 4 | static_cast<uint32_t>(is_digit(c) ? c - '0' : letter - 'a' + 10);
    }
    return out;
  }

  static void append_utf8(std::string& out, uint32_t c) {
    const int tails = c < 0x80 ? 0 : c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
    constexpr uint32_t kHeads[] = {0, 0xC0, 0xE0, 0xF0};
    out += static_cast<char>(kHeads[tails] | c >> 6 * tails);
    for (int i = tails; i-- > 0;) out += static_cast<char>(0x80 | (c >> 6 * i & 0x3F));
  }

  std::string_view text_;
  JsonEvents& events_;
  size_t at_ = 0;
};

}  // namespace

void read_json(std::string_view text, JsonEvents& events) { Reader(text, events).document(); }

}  // namespace uniflow
