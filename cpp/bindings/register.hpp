#pragma once

#include <pybind11/pybind11.h>

#include <utility>

namespace aer::bindings {

// The metaclass `type` instead of pybind11's own, which exists for static properties: stubs then match the runtime.
inline pybind11::metaclass plain_type() { return pybind11::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)); }

// T.__new__(T) raises TypeError instead of giving an object without content: Python refuses the __new__ of a base class
// where the class has another one of its own. T(...) is unaffected.
inline void forbid_new(const pybind11::handle& cls) {
    auto* const type = reinterpret_cast<PyTypeObject*>(cls.ptr());
    type->tp_new = [](PyTypeObject* self, PyObject*, PyObject*) { return pybind11::detail::make_new_instance(self); };
    PyType_Modified(type);
}

// A member function as one of a reference, which pybind11 never binds to None.
template <class Result, class Class, class... Arguments>
auto method(Result (Class::*function)(Arguments...) const) {
    return [function](const Class& self, Arguments... arguments) -> Result {
        return (self.*function)(std::forward<Arguments>(arguments)...);
    };
}

void register_group_statistics(pybind11::module_& m);
void register_ledger(pybind11::module_& m);
void register_partition(pybind11::module_& m);

}  // namespace aer::bindings
