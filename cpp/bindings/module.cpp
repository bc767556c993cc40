#include <pybind11/pybind11.h>

#include <system_error>

#include "register.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    m.doc() = "Ragged group statistics, the difficulty ledger and balanced partition (C++; see _C.pyi).";
    // std::invalid_argument is ValueError and std::length_error too; system errors keep their errno and file name.
    py::register_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const std::system_error& e) {
            const py::object os_error = py::reinterpret_borrow<py::object>(PyExc_OSError);
            const std::string what = e.what();
            const std::string path = what.substr(0, what.rfind(": "));
            const py::object instance = os_error(e.code().value(), e.code().message(), path);
            PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(instance.ptr())), instance.ptr());
        }
    });
    aer::bindings::register_group_statistics(m);
    aer::bindings::register_ledger(m);
    aer::bindings::register_partition(m);
}
