// Makes the shared library importable as metate._cpu or metate._cuda; importing it registers the kernels with torch.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if !defined(METATE_CUDA)
#include "cpu/isa.h"
#include "torch/bind.h"

// poison_scratch(on): hand kernels scratch memory that reads as NaN.
static PyObject* poison_scratch(PyObject*, PyObject* on) {
    int truth = PyObject_IsTrue(on);
    if (truth < 0) return nullptr;
    metate::bind::poison_scratch = truth;
    Py_RETURN_NONE;
}

// isas(): the instruction sets of this machine that the kernels were compiled for, the one in use first; and whether
// METATE_ISA asked for another.
static PyObject* isas(PyObject*, PyObject*) {
    using namespace metate::cpu;
    PyObject* names = Py_BuildValue("[s]", name_of(isa()));
    for (int i = isa_count - 1; names && i >= 0; --i) {
        Isa each = static_cast<Isa>(i);
        if (each == isa() || !has_isa(each)) continue;
        PyObject* name = PyUnicode_FromString(name_of(each));
        if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names ? Py_BuildValue("NO", names, isa_was_refused() ? Py_True : Py_False) : nullptr;
}

namespace metate::bind {
PyObject* prepare_search(PyObject*, PyObject*);  // pq/arrays.cpp
PyObject* prepare_add(PyObject*, PyObject*);     // pq/adding.cpp
PyObject* copy_lists(PyObject*, PyObject*);
PyObject* row_bias(PyObject*, PyObject*);
PyObject* add_to_clusters(PyObject*, PyObject*);  // pq/training.cpp
}  // namespace metate::bind

static PyMethodDef methods[] = {
    {"start", metate::bind::direct::safe<metate::bind::direct::start>, METH_VARARGS, nullptr},
    {"direct", metate::bind::direct::safe<metate::bind::direct::direct>, METH_O, nullptr},
    {"direct_calls", metate::bind::direct::count, METH_NOARGS, nullptr},
    {"prepare_search", metate::bind::direct::safe<metate::bind::prepare_search>, METH_VARARGS, nullptr},
    {"prepare_add", metate::bind::direct::safe<metate::bind::prepare_add>, METH_VARARGS, nullptr},
    {"copy_lists", metate::bind::direct::safe<metate::bind::copy_lists>, METH_VARARGS, nullptr},
    {"row_bias", metate::bind::direct::safe<metate::bind::row_bias>, METH_VARARGS, nullptr},
    {"add_to_clusters", metate::bind::direct::safe<metate::bind::add_to_clusters>, METH_VARARGS, nullptr},
    {"isas", isas, METH_NOARGS, nullptr},
    {"poison_scratch", poison_scratch, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
#else
static PyMethodDef methods[] = {{nullptr, nullptr, 0, nullptr}};
#endif

#define METATE_STRING_(x) #x
#define METATE_STRING(x) METATE_STRING_(x)
#define METATE_INIT_(name) PyInit_##name
#define METATE_INIT(name) METATE_INIT_(name)

PyMODINIT_FUNC METATE_INIT(METATE_MODULE)() {
    static PyModuleDef module = {
        PyModuleDef_HEAD_INIT, METATE_STRING(METATE_MODULE), nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
