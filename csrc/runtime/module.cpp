// metate._runtime: the block manager for Python.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "runtime/block_manager.h"

namespace py = pybind11;
using namespace pybind11::literals;
using metate::runtime::BlockManager;

static py::dict statistics(BlockManager& manager) {
    auto s = manager.statistics();
    return py::dict("blocks"_a = s.blocks, "block_size"_a = s.block_size, "free"_a = s.free, "cached"_a = s.cached,
                    "used"_a = s.used, "sequences"_a = s.sequences, "looked_up"_a = s.looked_up, "hits"_a = s.hits,
                    "evictions"_a = s.evictions, "copies"_a = s.copies);
}

static py::tuple tables(BlockManager& manager, const std::vector<std::int64_t>& sequences) {
    auto bytes = [](const std::vector<std::int32_t>& x) {
        return py::bytearray(reinterpret_cast<const char*>(x.data()), x.size() * sizeof(std::int32_t));
    };
    auto [table, lengths] = manager.tables(sequences);
    return py::make_tuple(bytes(table), bytes(lengths));
}

PYBIND11_MODULE(_runtime, module) {
    module.doc() = "Stateful host objects of metate, without tensors.";
    py::register_exception<metate::runtime::CacheFull>(module, "CacheFull", PyExc_RuntimeError);
    py::class_<BlockManager>(
        module, "BlockManager",
        "Which block of a paged cache holds which tokens of which sequence (Kwon et al. 2023, section 4).\n\n"
        "Sequences and tokens are integers. Sequences share blocks with copy on write, and find full blocks of "
        "earlier\n"
        "ones by their contents (tokens are compared, not only hashes). A call that raises has changed nothing:\n"
        "ValueError for a wrong argument, CacheFull where there is no room. One thread at a time; RuntimeError else.")
        .def(py::init<std::int64_t, std::int64_t, bool, std::uint64_t>(), "blocks"_a, "block_size"_a, py::kw_only(),
             "prefix_cache"_a = true, "hash_mask"_a = ~0ull)
        .def("allocate", &BlockManager::allocate, "sequence"_a, "tokens"_a,
             "Begins a sequence with the cached blocks that hold the beginning of its tokens, all but the last token "
             "at most.\n"
             "Returns the number of tokens that need not be computed.")
        .def("missing", &BlockManager::missing, "tokens"_a,
             "Blocks that allocate and append of all these tokens would take from available().")
        .def(
            "append",
            [](BlockManager& manager, std::int64_t sequence, const BlockManager::Tokens& tokens) {
                auto result = manager.append(sequence, tokens);
                return py::make_tuple(std::move(result.slots), std::move(result.copies));
            },
            "sequence"_a, "tokens"_a,
            "Room for more tokens at the end: (slots, copies). A slot is block * block_size + row; copies are pairs "
            "of\n"
            "blocks (from, to) to copy before anything is written. Full blocks are offered to others at once: write "
            "the\n"
            "slots before anything reads them. CacheFull where there is no room.")
        .def("fork", &BlockManager::fork, "parent"_a, "child"_a,
             "`child` begins as a copy of `parent` that shares its blocks until either of them writes.")
        .def("truncate", &BlockManager::truncate, "sequence"_a, "length"_a,
             "Forgets all tokens from `length` on; their blocks are not offered to other sequences again.")
        .def("free", &BlockManager::free, "sequence"_a,
             "Ends a sequence. Its full blocks stay known until their room is needed, the least recently used first.")
        .def("length", &BlockManager::length, "sequence"_a, "Tokens of a sequence.")
        .def("table", &BlockManager::table, "sequence"_a, "Block numbers of a sequence, in order.")
        .def("tables", &tables, "sequences"_a,
             "(table, lengths) of several sequences, bytes of int32: a row of blocks each, filled up with -1.")
        .def("tokens", &BlockManager::tokens, "sequence"_a, "Tokens of a sequence as its blocks hold them.")
        .def("available", &BlockManager::available,
             "Blocks that append may take: free ones and cached ones that no sequence holds.")
        .def("statistics", &statistics,
             "Blocks that are free, cached, used; blocks looked up by allocate and found; evictions and copies so far.")
        .def(
            "set_hook", &BlockManager::set_hook, "hook"_a.none(true),
            "hook(block, tokens): called before a cached block is given away, with all tokens from the beginning of "
            "the\n"
            "sequence to the end of the block (which costs their number); what it raises ends the call. None: no hook.")
        .def("check", &BlockManager::check,
             "Raises RuntimeError where the tables contradict each other; linear in everything.");
}
