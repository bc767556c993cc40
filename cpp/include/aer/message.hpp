// Error texts from parts: throw std::invalid_argument(message("decay=", decay, " must be in (0, 1]")).
#pragma once

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

namespace aer {

template <class Part>
void append(std::ostringstream& text, const Part& part) {
    text << part;
}

// As a user would write it: 0.9, not 0.90000000000000002.
inline void append(std::ostringstream& text, double value) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.15g", value);
    if (std::strtod(digits, nullptr) != value) std::snprintf(digits, sizeof digits, "%.17g", value);
    text << digits;
}

template <class... Parts>
std::string message(const Parts&... parts) {
    std::ostringstream text;
    (append(text, parts), ...);
    return text.str();
}

}  // namespace aer
