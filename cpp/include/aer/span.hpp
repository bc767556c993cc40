// A pointer and a length (C++17 has no std::span). Does not own what it points at.
#pragma once

#include <cstddef>

namespace aer {

template <class T>
struct Span {
    T* data = nullptr;
    std::size_t size = 0;

    T& operator[](std::size_t i) const { return data[i]; }
    T* begin() const { return data; }
    T* end() const { return data + size; }
};

}  // namespace aer
