// NumPy arrays in and out of the extension: exact dtypes in (never a hidden conversion), no copies out.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "aer/span.hpp"

namespace aer::bindings {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// The argument itself, or TypeError (not an array, other dtype) / ValueError (not one-dimensional, not contiguous).
template <class T>
Array<T> checked(const py::handle& argument, const char* name) {
    const std::string wanted = py::str(py::dtype::of<T>());
    const std::string prefix = std::string(name) + " must be a C-contiguous one-dimensional " + wanted + " array, got ";
    if (!py::isinstance<py::array>(argument))
        throw py::type_error(prefix + std::string(py::str(py::type::handle_of(argument).attr("__name__"))));
    const auto array = py::reinterpret_borrow<py::array>(argument);
    if (!py::dtype::of<T>().equal(array.dtype()))
        throw py::type_error(prefix + "dtype " + std::string(py::str(array.dtype())) + "; convert with .astype(numpy." +
                             wanted + ")");
    if (array.ndim() != 1) throw py::value_error(prefix + std::to_string(array.ndim()) + " dimensions");
    if (!Array<T>::check_(argument))
        throw py::value_error(prefix + "a strided view; convert with numpy.ascontiguousarray");
    if (reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) != 0 && array.size() > 0)
        throw py::value_error(prefix + "an unaligned view of other data; convert with .copy()");
    return py::reinterpret_borrow<Array<T>>(argument);
}

template <class T, int Flags>
Span<const T> span(const py::array_t<T, Flags>& array) {
    return {array.data(), static_cast<std::size_t>(array.size())};
}

template <class T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
    auto* owned = new std::vector<T>(std::move(values));
    const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<T>*>(p); });
    return py::array_t<T>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

}  // namespace aer::bindings
