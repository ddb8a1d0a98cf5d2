// The short way from Python to a binding: without torch's dispatcher, which costs more than a small kernel.
//
// Only calls that the dispatcher would hand to this binding unchanged may take it: no transform, mode or profiler is on
// (the guards), no tensor wants a gradient or is a promise of another. And a call runs only if one like it, equal in
// all but the tensors' memory and strides, was admitted before: whatever else must be checked depends on nothing else.
// CPU only: memory that comes back through DLPack does not know torch's `record_stream`.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "tensor.h"

namespace metate::bind::direct {

// Python objects that reading arguments needs; set once.
struct Python {
    PyObject *tensor_type, *parameter_type;
    PyObject* guards;         // a tuple of functions; one that says true wants the dispatcher
    PyObject* is_neg;         // torch.Tensor.is_neg
    PyObject* requires_grad;  // the name
};
inline Python python{};

// Of a new reference; an exception counts as true.
inline bool truth(PyObject* object) {
    const bool answer = !object || (object != Py_False && object != Py_None && PyObject_IsTrue(object));
    if (PyErr_Occurred()) PyErr_Clear();
    Py_XDECREF(object);
    return answer;
}

// The first `count` guards; all of them where tensors are arguments.
inline bool dispatcher_is_wanted(Py_ssize_t count = PyTuple_Size(python.guards)) {
    for (Py_ssize_t i = 0; i < count; ++i)
        if (truth(PyObject_CallNoArgs(PyTuple_GetItem(python.guards, i)))) return true;
    return false;
}

// Reads arguments and writes down everything that a choice of backend depends on. False: the dispatcher must see it.
class Reader {
  public:
    // grad: a tensor that wants a gradient needs the dispatcher.
    explicit Reader(bool grad) : grad_(grad) {}

    bool read(PyObject* object, Tensor& out) {
        PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
        if (type != python.tensor_type && type != python.parameter_type) return false;
        dlpack::Tensor tensor;
        if (exchange->tensor_from_object(object, &tensor)) {
            PyErr_Clear();
            return false;
        }
        if (tensor.device.type != dlpack::cpu) return false;
        const bool whole = tensor.dtype.kind == dlpack::integer || tensor.dtype.kind == dlpack::natural;
        if (!whole && ((grad_ && truth(PyObject_GetAttr(object, python.requires_grad))) ||
                       truth(PyObject_CallFunctionObjArgs(python.is_neg, object, nullptr))))
            return false;
        int64_t elements = 1;
        for (int i = 0; i < tensor.dims; ++i) elements *= tensor.sizes[i];
        if (!tensor.data && elements) return false;  // zeros that autograd does not store
        out.borrow(tensor);
        return write(tensor.dtype.kind | tensor.dtype.bits << 8 | tensor.dims << 16) &&
               write(tensor.sizes, sizeof(int64_t) * tensor.dims);
    }

    bool read(PyObject* object, std::optional<Tensor>& out) {
        if (object == Py_None) return write(-1);
        return read(object, out.emplace());
    }

    bool read(PyObject* object, TensorOrNumber& out) {
        double number;
        if (!read(object, number)) return read(object, out.emplace<Tensor>());
        out = number;
        return true;
    }

    // An integer is the number that it is, up to those that may be rounded.
    bool read(PyObject* object, double& out) {
        if (PyLong_CheckExact(object)) {
            int overflow;
            const long long whole = PyLong_AsLongLongAndOverflow(object, &overflow);
            out = static_cast<double>(whole);
            return !overflow && whole >> 53 == whole >> 63 && write(out);
        }
        if (!PyFloat_CheckExact(object)) return false;
        out = PyFloat_AsDouble(object);
        return write(out);
    }

    bool read(PyObject* object, int64_t& out) {
        if (!PyLong_CheckExact(object)) return false;
        int overflow;
        out = PyLong_AsLongLongAndOverflow(object, &overflow);
        return !overflow && write(out);
    }

    bool read(PyObject* object, bool& out) {
        if (object != Py_True && object != Py_False) return false;
        out = object == Py_True;
        return write(out);
    }

    template <class... Values>
    bool read(PyObject* object, std::tuple<Values...>& out) {
        Py_ssize_t i = 0;
        if (!PyTuple_Check(object) || PyTuple_Size(object) != sizeof...(Values)) return false;
        return std::apply([&](auto&... each) { return (read(PyTuple_GetItem(object, i++), each) && ...); }, out);
    }

    std::string_view key() const { return {key_, used_}; }

  private:
    template <class T>
    bool write(T value) {
        return write(&value, sizeof value);
    }
    bool write(const void* bytes, size_t count) {
        if (count > sizeof key_ - used_) return false;
        memcpy(key_ + used_, bytes, count);
        used_ += count;
        return true;
    }

    bool grad_;
    size_t used_ = 0;
    char key_[1024];
};

// Buffers joined the limited API with Python 3.11, as they have been since 3.0.
#if defined(Py_LIMITED_API) && Py_LIMITED_API + 0 < 0x030b0000
extern "C" {
struct Py_buffer {
    void* buf;
    PyObject* obj;
    Py_ssize_t len, itemsize;
    int readonly, ndim;
    char* format;
    Py_ssize_t *shape, *strides, *suboffsets;
    void* internal;
};
PyAPI_FUNC(int) PyObject_GetBuffer(PyObject*, Py_buffer*, int flags);
PyAPI_FUNC(void) PyBuffer_Release(Py_buffer*);
}
constexpr int PyBUF_WRITABLE = 1, PyBUF_FORMAT = 4, PyBUF_ND = 8;
#endif

// Lets other Python threads run.
struct Unlocked {
    PyThreadState* state = PyEval_SaveThread();
    ~Unlocked() { PyEval_RestoreThread(state); }
};

// Calls that Python has admitted, by key.
class Admitted {
  public:
    bool has(std::string_view key) const { return keys_.find(key) != keys_.end(); }
    void add(std::string_view key) {
        constexpr size_t many = 4096;
        if (keys_.size() >= many) keys_.clear();
        keys_.emplace(key);
    }
    void clear() { keys_.clear(); }

  private:
    struct Hash : std::hash<std::string_view> {
        using is_transparent = void;
    };
    std::unordered_set<std::string, Hash, std::equal_to<>> keys_;
};

inline PyObject* to_python(Tensor& result, bool = false) {
    void* object = nullptr;
    if (exchange->object_from_managed(result.release(), &object)) return nullptr;
    return static_cast<PyObject*>(object);
}

template <class... Results>
PyObject* to_python(std::tuple<Results...>& results, bool first_only) {
    if (first_only) return to_python(std::get<0>(results));
    PyObject* tuple = PyTuple_New(sizeof...(Results));
    Py_ssize_t i = 0;
    auto put = [&](Tensor& result) {
        PyObject* object = tuple ? to_python(result) : nullptr;
        if (!object)
            Py_CLEAR(tuple);
        else
            PyTuple_SetItem(tuple, i++, object);
    };
    std::apply([&](auto&... each) { (put(each), ...); }, results);
    return tuple;
}

// The C++ exception that was caught, as Python's.
inline PyObject* raise() {
    try {
        throw;
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    } catch (...) {
        PyErr_SetString(PyExc_RuntimeError, "metate: unknown error in a kernel");
    }
    return nullptr;
}

// A method of Python's out of which no C++ exception comes: it would end the process.
template <PyObject* (*method)(PyObject*, PyObject*)>
PyObject* safe(PyObject* self, PyObject* args) {
    try {
        return method(self, args);
    } catch (...) {
        return raise();
    }
}

struct Binding {
    PyObject* (*call)(const Binding&, PyObject* args, bool first_only);
    void (*admit)(Binding&, PyObject* args);
    Admitted admitted;
};

inline std::unordered_map<std::string, Binding>& bindings() {
    static std::unordered_map<std::string, Binding> all;
    return all;
}

inline thread_local int64_t served = 0;  // direct calls of this thread

template <auto fn>
struct Door;

template <class Result, class... Args, Result (*fn)(Args...)>
struct Door<fn> {
    using Values = std::tuple<std::remove_cvref_t<Args>...>;

    static PyObject* call(const Binding& binding, PyObject* args, bool first_only) {
        try {
            Values values;
            Reader reader(aoti_torch_grad_mode_is_enabled());
            if (!reader.read(args, values) || !binding.admitted.has(reader.key())) Py_RETURN_NOTIMPLEMENTED;
            if constexpr (std::is_void_v<Result>) {
                without_lock(values);
                ++served;
                Py_RETURN_NONE;
            } else {
                Result result = without_lock(values);
                ++served;
                return to_python(result, first_only);
            }
        } catch (const NeedsDispatcher&) {
            Py_RETURN_NOTIMPLEMENTED;
        } catch (...) {
            return raise();
        }
    }

    static void admit(Binding& binding, PyObject* args) {
        try {
            Values values;
            Reader reader(false);
            if (reader.read(args, values)) binding.admitted.add(reader.key());
        } catch (const NeedsDispatcher&) {
        }
    }

  private:
    static Result without_lock(const Values& values) {
        Unlocked unlocked;
        return std::apply(fn, values);
    }
};

inline Binding* binding_of(PyObject* capsule) {
    return static_cast<Binding*>(PyCapsule_GetPointer(capsule, nullptr));
}

inline bool is_tuple(PyObject* args) {
    if (PyTuple_Check(args)) return true;
    PyErr_SetString(PyExc_TypeError, "expected a tuple of arguments");
    return false;
}

// call(args, first_only): the binding's results or the first of them, or NotImplemented where the dispatcher must be
// asked.
inline PyObject* call(PyObject* capsule, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 2) return PyErr_Format(PyExc_TypeError, "expected two arguments");
    if (!is_tuple(arguments[0])) return nullptr;
    if (dispatcher_is_wanted()) Py_RETURN_NOTIMPLEMENTED;
    const Binding& binding = *binding_of(capsule);
    return binding.call(binding, arguments[0], arguments[1] == Py_True);
}

// admit(args): calls like this one may come directly.
inline PyObject* admit(PyObject* capsule, PyObject* args) {
    if (!is_tuple(args)) return nullptr;
    Binding& binding = *binding_of(capsule);
    binding.admit(binding, args);
    Py_RETURN_NONE;
}

inline PyObject* forget(PyObject* capsule, PyObject*) {
    binding_of(capsule)->admitted.clear();
    Py_RETURN_NONE;
}

// count(): how many direct calls of this thread were served.
inline PyObject* count(PyObject*, PyObject*) {
    return PyLong_FromLongLong(served);
}

// Finds torch's interface for direct calls; false without an exception where it has none.
inline bool find_exchange() {
    if (exchange) return true;
    PyObject* capsule = PyObject_GetAttrString(python.tensor_type, "__dlpack_c_exchange_api__");
    auto* offered =
        capsule ? static_cast<dlpack::Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api")) : nullptr;
    Py_XDECREF(capsule);  // the table itself lives as long as the process
    PyErr_Clear();
    while (offered && offered->version.major > dlpack::major_version) offered = offered->older;
    if (!offered || offered->version.major < dlpack::major_version || !offered->tensor_from_object) return false;
    python.is_neg = PyObject_GetAttrString(python.tensor_type, "is_neg");
    python.requires_grad = PyUnicode_InternFromString("requires_grad");
    if (python.is_neg && python.requires_grad) exchange = offered;
    return exchange;
}

// start(tensor_type, parameter_type, guards): whether there are direct ways with this torch.
inline PyObject* start(PyObject*, PyObject* args) {
    if (!PyArg_ParseTuple(args, "OOO!", &python.tensor_type, &python.parameter_type, &PyTuple_Type, &python.guards))
        return nullptr;
    Py_INCREF(args);  // for as long as the process lives
    const bool found = find_exchange();
    return PyErr_Occurred() ? nullptr : PyBool_FromLong(found);
}

// direct(name): (call, admit, forget) of a binding.
inline PyObject* direct(PyObject*, PyObject* name) {
    static PyMethodDef methods[] = {
        {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, nullptr},
        {"admit", safe<admit>, METH_O, nullptr},
        {"forget", forget, METH_NOARGS, nullptr},
    };
    const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
    if (!text) return nullptr;
    auto found = bindings().find(text);
    if (found == bindings().end()) return PyErr_Format(PyExc_KeyError, "%s", text);
    PyObject* capsule = PyCapsule_New(&found->second, nullptr, nullptr);
    PyObject* ways = PyTuple_New(3);
    for (int i = 0; ways && capsule && i < 3; ++i) {
        PyObject* way = PyCFunction_NewEx(&methods[i], capsule, nullptr);
        if (!way)
            Py_CLEAR(ways);
        else
            PyTuple_SetItem(ways, i, way);
    }
    Py_XDECREF(capsule);
    return ways;
}

}  // namespace metate::bind::direct
