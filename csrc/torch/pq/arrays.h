// numpy arrays as arguments, and functions that are called from Python again and again with most arguments the same.
#pragma once

#include "lists.h"

#if !defined(METATE_CUDA)
namespace metate::bind {
namespace {

using namespace direct;

constexpr Py_ssize_t array_guards = 2;  // the first, which concern more than tensors

// What is called from Python again and again, with numpy arrays: around a single query or vector, making tensors costs
// more than the kernels do.
template <class T>
struct Prepared {
    PyObject* arguments;  // keep the memory that `value` describes
    T value;
    ~Prepared() { Py_DECREF(arguments); }

    static const T& of(PyObject* capsule) {
        return static_cast<Prepared*>(PyCapsule_GetPointer(capsule, nullptr))->value;
    }
};

// A numpy array of one or two dimensions, in one piece.
class Array {
  public:
    Array(PyObject* object, DType dtype, int flags) {
        valid_ = PyObject_GetBuffer(object, &buffer_, PyBUF_ND | PyBUF_FORMAT | flags) == 0;
        if (!valid_) {
            PyErr_Clear();
            return;
        }
        if (buffer_.ndim < 1 || buffer_.ndim > 2 || buffer_.itemsize != bytes_of(dtype) || !is_native(dtype)) return;
        for (int i = 0; i < buffer_.ndim; ++i) sizes_[i] = buffer_.shape[i];
        strides_[0] = buffer_.ndim == 2 ? sizes_[1] : 1;
        fits_ = true;
        dtype_ = dtype;
    }
    Array(const Array&) = delete;
    ~Array() {
        if (valid_) PyBuffer_Release(&buffer_);
    }
    bool is(int64_t rows, int64_t columns) const {
        return fits_ && buffer_.ndim == 2 && sizes_[0] == rows && sizes_[1] == columns;
    }
    bool is(int64_t count) const { return fits_ && buffer_.ndim == 1 && sizes_[0] == count; }
    View<2> view() const { return contiguous_view(buffer_.buf, dtype_, {sizes_[0], sizes_[1]}); }
    template <class T>
    T* data() const {
        return static_cast<T*>(buffer_.buf);
    }
    int64_t size(int i) const { return sizes_[i]; }
    // While this lives.
    Tensor tensor() {
        Tensor tensor;
        tensor.borrow({buffer_.buf, {dlpack::cpu, 0}, 2, {dlpack::floating, 32, 1}, sizes_, strides_, 0});
        return tensor;
    }

  private:
    // Numbers of this machine, where it reads them.
    bool is_native(DType dtype) const {
        const char* const format = buffer_.format ? buffer_.format : "";
        const bool known = dtype == DType::f32 ? *format == 'f' : *format == 'l' || *format == 'q';
        return known && format[1] == 0 && reinterpret_cast<uintptr_t>(buffer_.buf) % bytes_of(dtype) == 0;
    }

    Py_buffer buffer_;
    bool valid_ = false, fits_ = false;
    DType dtype_ = DType::f32;
    int64_t sizes_[2] = {0, 0}, strides_[2] = {0, 1};
};

// Whole numbers: bytes that we made, or a numpy array of one dimension; or None.
class Numbers {
  public:
    explicit Numbers(PyObject* object) {
        if (PyBytes_Check(object)) {
            data_ = reinterpret_cast<const int64_t*>(PyBytes_AsString(object));
            count_ = PyBytes_Size(object) / 8;
        } else if (object != Py_None) {
            array_.emplace(object, DType::i64, 0);
            if (array_->is(array_->size(0))) data_ = array_->data<const int64_t>(), count_ = array_->size(0);
        }
    }
    explicit operator bool() const { return data_; }
    const int64_t* data() const { return data_; }
    int64_t count() const { return count_; }

  private:
    std::optional<Array> array_;
    const int64_t* data_ = nullptr;
    int64_t count_ = -1;
};

// A Python function over a `T` made of arguments that stay the same; None where they cannot be read directly.
template <class T, class Values>
PyObject* prepare(PyMethodDef& method, PyObject* args) {
    PyObject* capsule = nullptr;
    try {
        Values values;
        direct::Reader reader(false);
        if (!exchange || !reader.read(args, values)) Py_RETURN_NONE;
        auto prepared = std::apply([&](const auto&... each) { return new Prepared<T>{args, T(each...)}; }, values);
        Py_INCREF(args);
        const auto free = [](PyObject* owner) {
            delete static_cast<Prepared<T>*>(PyCapsule_GetPointer(owner, nullptr));
        };
        capsule = PyCapsule_New(prepared, nullptr, free);
        if (!capsule) delete prepared;
    } catch (const NeedsDispatcher&) {
        Py_RETURN_NONE;
    }
    PyObject* function = capsule ? PyCFunction_NewEx(&method, capsule, nullptr) : nullptr;
    Py_XDECREF(capsule);
    return function;
}

}  // namespace
}  // namespace metate::bind
#endif
