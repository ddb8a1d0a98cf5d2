// The block manager: free blocks on a stack, cached ones in a list by age, known ones in a table by hash.
#include "runtime/block_manager.h"

#include <algorithm>
#include <limits>

namespace metate::runtime {

namespace {

constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max();

[[noreturn]] void refuse(const char* method, const std::string& what) {
    throw std::invalid_argument("metate.BlockManager" + std::string(method) + ": " + what);
}

void must_be_tokens(const char* method, const BlockManager::Tokens& tokens) {
    for (std::int64_t token : tokens)
        if (token < 0 || token > kLargest)
            refuse(method, "a token is " + std::to_string(token) + ", expected 0 to 2147483647");
}

std::uint64_t mixed(std::uint64_t x) {  // the finaliser of splitmix64 (Steele et al. 2014)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

}  // namespace

// A call under way: every public method holds one.
class BlockManager::Turn {
  public:
    explicit Turn(BlockManager& manager) : manager_(manager) {
        if (manager_.busy_.exchange(true))
            throw std::logic_error(
                "metate.BlockManager: called by a second thread, or by its own hook, while a call is under way");
    }
    ~Turn() { manager_.busy_ = false; }
    Turn(const Turn&) = delete;

  private:
    BlockManager& manager_;
};

BlockManager::BlockManager(std::int64_t blocks, std::int64_t block_size, bool prefix_cache, std::uint64_t hash_mask)
    : block_size_(block_size), prefix_cache_(prefix_cache), hash_mask_(hash_mask) {
    if (blocks < 1 || blocks > kLargest)
        refuse("", "blocks is " + std::to_string(blocks) + ", expected 1 to 2147483647");
    if (block_size < 1 || block_size > kLargest)
        refuse("", "block_size is " + std::to_string(block_size) + ", expected 1 to 2147483647");
    blocks_.resize(blocks);
    contents_.resize(blocks * block_size);
    free_.reserve(blocks);
    for (std::int64_t block = blocks - 1; block >= 0; --block) free_.push_back(static_cast<std::int32_t>(block));
}

std::int64_t BlockManager::allocate(std::int64_t id, const Tokens& tokens) {
    Turn turn(*this);
    must_be_new(".allocate", id);
    must_be_tokens(".allocate", tokens);
    std::vector<std::int32_t> found = match(tokens);
    Sequence& sequence = sequences_[id];
    for (std::int32_t block : found) {
        hold(block);
        sequence.entries.push_back({block, blocks_[block].node});
    }
    sequence.length = static_cast<std::int64_t>(found.size()) * block_size_;
    if (prefix_cache_ && !tokens.empty()) looked_up_ += (static_cast<std::int64_t>(tokens.size()) - 1) / block_size_;
    hits_ += static_cast<std::int64_t>(found.size());
    return sequence.length;
}

std::int64_t BlockManager::missing(const Tokens& tokens) {
    Turn turn(*this);
    must_be_tokens(".missing", tokens);
    std::int64_t needed = blocks_of(static_cast<std::int64_t>(tokens.size()));
    for (std::int32_t block : match(tokens)) needed -= blocks_[block].references > 0;
    return needed;
}

BlockManager::Appended BlockManager::append(std::int64_t id, const Tokens& tokens) {
    Turn turn(*this);
    Sequence& sequence = find(".append", id);
    must_be_tokens(".append", tokens);
    Appended result;
    if (tokens.empty()) return result;
    std::int64_t end = sequence.length + static_cast<std::int64_t>(tokens.size()), row = sequence.length % block_size_;
    bool copy = row > 0 && blocks_[sequence.entries.back().block].references > 1;
    reserve(id, blocks_of(end) - static_cast<std::int64_t>(sequence.entries.size()) + copy);
    if (copy) {
        Entry& last = sequence.entries.back();
        std::int32_t fresh = take();
        std::copy_n(contents(last.block), row, contents(fresh));
        release(last.block);
        result.copies.emplace_back(last.block, fresh);
        last.block = fresh;
        ++copies_;
    }
    result.slots.reserve(tokens.size());
    for (std::int64_t token : tokens) {
        row = sequence.length % block_size_;
        if (row == 0) sequence.entries.push_back({take(), 0});
        std::int32_t block = sequence.entries.back().block;
        contents(block)[row] = static_cast<std::int32_t>(token);
        result.slots.push_back(block * block_size_ + row);
        ++sequence.length;
        if (row == block_size_ - 1 && prefix_cache_) remember(sequence, sequence.entries.size() - 1);
    }
    return result;
}

void BlockManager::fork(std::int64_t parent, std::int64_t child) {
    Turn turn(*this);
    find(".fork", parent);
    must_be_new(".fork", child);
    Sequence& copy = sequences_[child];
    copy = sequences_.at(parent);
    for (const Entry& entry : copy.entries) ++blocks_[entry.block].references;
}

void BlockManager::truncate(std::int64_t id, std::int64_t length) {
    Turn turn(*this);
    Sequence& sequence = find(".truncate", id);
    if (length < 0 || length > sequence.length)
        refuse(".truncate",
               "length is " + std::to_string(length) + ", expected 0 to " + std::to_string(sequence.length));
    while (static_cast<std::int64_t>(sequence.entries.size()) > blocks_of(length)) {
        std::int32_t block = sequence.entries.back().block;
        sequence.entries.pop_back();
        forget(block);
        release(block);
    }
    if (length < sequence.length && length % block_size_) {
        forget(sequence.entries.back().block);
        sequence.entries.back().node = 0;
    }
    sequence.length = length;
}

void BlockManager::free(std::int64_t id) {
    Turn turn(*this);
    Sequence& sequence = find(".free", id);
    // Last blocks first: they are of use only while those before them are still there.
    for (; !sequence.entries.empty(); sequence.entries.pop_back()) release(sequence.entries.back().block);
    sequences_.erase(id);
}

std::int64_t BlockManager::length(std::int64_t id) {
    Turn turn(*this);
    return find(".length", id).length;
}

std::vector<std::int32_t> BlockManager::table(std::int64_t id) {
    Turn turn(*this);
    std::vector<std::int32_t> table;
    for (const Entry& entry : find(".table", id).entries) table.push_back(entry.block);
    return table;
}

std::pair<std::vector<std::int32_t>, std::vector<std::int32_t>> BlockManager::tables(
    const std::vector<std::int64_t>& ids) {
    Turn turn(*this);
    std::vector<const Sequence*> sequences;
    std::size_t width = 0;
    for (std::int64_t id : ids) {
        sequences.push_back(&find(".tables", id));
        width = std::max(width, sequences.back()->entries.size());
    }
    std::vector<std::int32_t> table(ids.size() * width, kNone), lengths;
    for (std::size_t row = 0; row < ids.size(); ++row) {
        const std::vector<Entry>& entries = sequences[row]->entries;
        for (std::size_t i = 0; i < entries.size(); ++i) table[row * width + i] = entries[i].block;
        lengths.push_back(static_cast<std::int32_t>(sequences[row]->length));
    }
    return {std::move(table), std::move(lengths)};
}

BlockManager::Tokens BlockManager::tokens(std::int64_t id) {
    Turn turn(*this);
    const Sequence& sequence = find(".tokens", id);
    Tokens tokens;
    for (std::int64_t i = 0; i < sequence.length; ++i)
        tokens.push_back(contents(sequence.entries[i / block_size_].block)[i % block_size_]);
    return tokens;
}

std::int64_t BlockManager::available() {
    Turn turn(*this);
    return static_cast<std::int64_t>(free_.size()) + cached_;
}

Statistics BlockManager::statistics() {
    Turn turn(*this);
    std::int64_t blocks = static_cast<std::int64_t>(blocks_.size()), free = static_cast<std::int64_t>(free_.size());
    return {blocks,
            block_size_,
            free,
            cached_,
            blocks - free - cached_,
            static_cast<std::int64_t>(sequences_.size()),
            looked_up_,
            hits_,
            evictions_,
            copies_};
}

void BlockManager::set_hook(Hook hook) {
    Turn turn(*this);
    hook_ = std::move(hook);
}

void BlockManager::check() {
    Turn turn(*this);
    auto must = [](bool truth, const char* what) {
        if (!truth) throw std::logic_error(std::string("metate.BlockManager: ") + what);
    };
    std::vector<std::int32_t> references(blocks_.size());
    for (const auto& [id, sequence] : sequences_) {
        must(static_cast<std::int64_t>(sequence.entries.size()) == blocks_of(sequence.length),
             "a table has another length");
        for (const Entry& entry : sequence.entries) ++references[entry.block];
    }
    std::vector<char> place(blocks_.size());
    for (std::int32_t block : free_)
        must(!place[block]++ && !blocks_[block].node, "a free block is known or free twice");
    std::int64_t cached = 0;
    for (std::int32_t block = oldest_, before = kNone; block != kNone; before = block, block = blocks_[block].newer) {
        must(!place[block]++ && blocks_[block].node && blocks_[block].older == before,
             "the order of eviction is broken");
        must(blocks_[block].newer != kNone || block == newest_, "the order of eviction has no end");
        ++cached;
    }
    must(cached == cached_, "cached blocks are miscounted");
    std::size_t known = 0;
    for (std::size_t block = 0; block < blocks_.size(); ++block) {
        const Block& each = blocks_[block];
        must(each.references == references[block], "references are miscounted");
        must((each.references > 0) != place[block], "a block is lost, or free while in use");
        if (!each.node) continue;
        ++known;
        auto home = home_.find(each.node);
        must(home != home_.end() && home->second == static_cast<std::int32_t>(block), "two blocks are one node");
        must(each.hash == hash_of(each.parent, contents(static_cast<std::int32_t>(block))),
             "a known block was written to");
    }
    must(known == known_.size() && known == home_.size(), "known blocks are miscounted");
}

BlockManager::Sequence& BlockManager::find(const char* method, std::int64_t id) {
    auto found = sequences_.find(id);
    if (found == sequences_.end())
        refuse(method, "sequence is " + std::to_string(id) + ", expected one of the " +
                           std::to_string(sequences_.size()) +
                           " that are allocated (a sequence that was freed is gone)");
    return found->second;
}

void BlockManager::must_be_new(const char* method, std::int64_t id) const {
    if (sequences_.count(id))
        refuse(method, "sequence is " + std::to_string(id) +
                           ", which is allocated already; expected another, or free it first");
}

std::uint64_t BlockManager::hash_of(std::uint64_t parent, const std::int32_t* tokens) const {
    std::uint64_t hash = mixed(parent + 0x9E3779B97F4A7C15ull);
    for (std::int64_t i = 0; i < block_size_; ++i) hash = mixed(hash + static_cast<std::uint64_t>(tokens[i]) + 1);
    return hash & hash_mask_;
}

std::int32_t BlockManager::lookup(std::uint64_t parent, std::uint64_t hash, const std::int32_t* tokens) {
    auto [begin, end] = known_.equal_range(hash);
    for (auto it = begin; it != end; ++it)
        if (blocks_[it->second].parent == parent && std::equal(tokens, tokens + block_size_, contents(it->second)))
            return it->second;
    return kNone;
}

// The cached blocks that hold the beginning of the tokens, without the last token.
std::vector<std::int32_t> BlockManager::match(const Tokens& tokens) {
    std::vector<std::int32_t> found;
    if (!prefix_cache_) return found;
    std::vector<std::int32_t> part(block_size_);
    std::uint64_t node = 0;
    for (std::int64_t end = block_size_; end < static_cast<std::int64_t>(tokens.size()); end += block_size_) {
        std::copy_n(tokens.begin() + (end - block_size_), block_size_, part.begin());
        std::int32_t block = lookup(node, hash_of(node, part.data()), part.data());
        if (block == kNone) break;
        found.push_back(block);
        node = blocks_[block].node;
    }
    return found;
}

// Makes sure that `blocks` can be taken, and tells the hook what this will cost; the last chance to throw.
void BlockManager::reserve(std::int64_t id, std::int64_t blocks) {
    std::int64_t free = static_cast<std::int64_t>(free_.size());
    if (blocks > free + cached_)
        throw CacheFull("metate.BlockManager.append: sequence " + std::to_string(id) + " needs " +
                        std::to_string(blocks) + " more blocks of " + std::to_string(block_size_) + " tokens, " +
                        std::to_string(free + cached_) + " of " + std::to_string(blocks_.size()) +
                        " are free; free a sequence, or make a larger cache");
    std::int32_t block = oldest_;
    for (std::int64_t i = free; hook_ && i < blocks; ++i, block = blocks_[block].newer) announce(block);
}

void BlockManager::announce(std::int32_t block) {
    std::vector<std::int32_t> path{block};
    for (std::uint64_t node = blocks_[block].parent; node; node = blocks_[path.back()].parent) {
        auto home = home_.find(node);
        if (home == home_.end()) return;  // a prefix of it is gone: nobody can find this block any more
        path.push_back(home->second);
    }
    Tokens prefix;
    for (auto each = path.rbegin(); each != path.rend(); ++each)
        prefix.insert(prefix.end(), contents(*each), contents(*each) + block_size_);
    hook_(block, prefix);
}

// A block of its own for a sequence; `reserve` has seen to it that there is one.
std::int32_t BlockManager::take() {
    std::int32_t block;
    if (free_.empty()) {
        block = oldest_;
        unlink(block);
        forget(block);
        ++evictions_;
    } else {
        block = free_.back();
        free_.pop_back();
    }
    blocks_[block].references = 1;
    return block;
}

void BlockManager::hold(std::int32_t block) {
    if (blocks_[block].references++ == 0) unlink(block);
}

void BlockManager::release(std::int32_t block) {
    if (--blocks_[block].references > 0) return;
    if (blocks_[block].node)
        link(block);
    else
        free_.push_back(block);
}

// A block has become full: from now on its contents find it, unless another block already stands for them.
void BlockManager::remember(Sequence& sequence, std::size_t index) {
    Entry& entry = sequence.entries[index];
    std::uint64_t parent = index ? sequence.entries[index - 1].node : 0;
    std::uint64_t hash = hash_of(parent, contents(entry.block));
    std::int32_t twin = lookup(parent, hash, contents(entry.block));
    if (twin != kNone) {
        entry.node = blocks_[twin].node;
        return;
    }
    entry.node = ++nodes_;
    if (parent && !home_.count(parent)) return;  // nobody could find it
    Block& block = blocks_[entry.block];
    block.node = entry.node;
    block.parent = parent;
    block.hash = hash;
    known_.emplace(hash, entry.block);
    home_.emplace(entry.node, entry.block);
}

void BlockManager::forget(std::int32_t block) {
    if (!blocks_[block].node) return;
    auto [begin, end] = known_.equal_range(blocks_[block].hash);
    known_.erase(std::find_if(begin, end, [&](const auto& each) { return each.second == block; }));
    home_.erase(blocks_[block].node);
    blocks_[block].node = 0;
}

void BlockManager::link(std::int32_t block) {
    blocks_[block].older = newest_;
    blocks_[block].newer = kNone;
    (newest_ == kNone ? oldest_ : blocks_[newest_].newer) = block;
    newest_ = block;
    ++cached_;
}

void BlockManager::unlink(std::int32_t block) {
    const Block& each = blocks_[block];
    (each.older == kNone ? oldest_ : blocks_[each.older].newer) = each.newer;
    (each.newer == kNone ? newest_ : blocks_[each.newer].older) = each.older;
    --cached_;
}

}  // namespace metate::runtime
