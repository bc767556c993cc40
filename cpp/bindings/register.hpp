#pragma once

#include <pybind11/pybind11.h>

namespace aer::bindings {

// The metaclass `type` instead of pybind11's own, which exists for static properties: stubs then match the runtime.
inline pybind11::metaclass plain_type() { return pybind11::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)); }

void register_group_statistics(pybind11::module_& m);
void register_ledger(pybind11::module_& m);
void register_partition(pybind11::module_& m);

}  // namespace aer::bindings
