// What the operators' rules.py in python/metate/ops expect of the values of whole numbers, for direct calls, which
// Python does not see.
#pragma once

#include <algorithm>
#include <vector>

#include "bind.h"

namespace metate::bind {

// Calls that Python did not check and that are wrong go to it.
template <class Test>
void expect(const Tensor& x, const Test& is_fine) {
    if (x.direct() && !is_fine()) throw NeedsDispatcher{};
}

inline View<2> as_row(const View<1>& numbers) {
    return {numbers.data, numbers.dtype, {1, numbers.size[0]}, {0, numbers.stride[0]}};
}

template <class Number, class Test>
bool are_all_of(const View<2>& numbers, const Test& test) {
    const Number* row = static_cast<const Number*>(numbers.data);
    for (int64_t i = 0; i < numbers.size[0]; ++i, row += numbers.stride[0])
        for (int64_t j = 0; j < numbers.size[1]; ++j)
            if (!test(int64_t{row[j * numbers.stride[1]]})) return false;
    return true;
}

template <class Test>
bool are_all(const View<2>& numbers, const Test& test) {
    return numbers.dtype == DType::i64 ? are_all_of<int64_t>(numbers, test) : are_all_of<int32_t>(numbers, test);
}

inline bool are_within(const View<2>& numbers, int64_t least, int64_t most) {
    return are_all(numbers, [=](int64_t number) { return least <= number && number < most; });
}

// Of -1 … most - 1; all but -1 at most once.
inline bool are_once(const View<2>& numbers, int64_t most) {
    std::vector<char> seen(static_cast<size_t>(most));
    return are_all(numbers, [&](int64_t number) {
        if (number < 0 || number >= most) return number == -1;
        char& one = seen[static_cast<size_t>(number)];
        return !std::exchange(one, 1);
    });
}

// The same, where there are few numbers and many that they could be.
inline bool are_few_once(const View<1>& numbers, int64_t most) {
    std::vector<int64_t> given;
    given.reserve(static_cast<size_t>(numbers.size[0]));
    const auto is_slot = [&](int64_t number) {
        if (number >= 0) given.push_back(number);
        return -1 <= number && number < most;
    };
    if (!are_all(as_row(numbers), is_slot)) return false;
    if (!std::is_sorted(given.begin(), given.end())) std::sort(given.begin(), given.end());
    return std::adjacent_find(given.begin(), given.end()) == given.end();
}

// Every number from 0 to their count once.
inline bool is_permutation(const View<1>& numbers) {
    const View<2> row = as_row(numbers);
    return are_within(row, 0, numbers.size[0]) && are_once(row, numbers.size[0]);
}

// Where segments of `rows` rows start.
inline bool are_offsets(const View<1>& starts, int64_t rows) {
    int64_t last = 0;
    return are_all(as_row(starts), [&](int64_t start) { return std::exchange(last, start) <= start && start <= rows; });
}

}  // namespace metate::bind
