// Random operations on the block manager; it checks its own tables, the sanitizers check its memory.
#include <cstdio>
#include <random>

#include "runtime/block_manager.h"

using metate::runtime::BlockManager;
using metate::runtime::CacheFull;

int main() {
    for (unsigned seed = 0; seed < 20; ++seed) {
        std::mt19937 random(seed);
        auto draw = [&](std::int64_t end) { return static_cast<std::int64_t>(random() % end); };
        std::int64_t size = 1 + draw(5), told = 0, full = 0, next = 0;
        BlockManager manager(30, size, seed % 4 != 3, seed % 2 ? ~0ull : 1);
        manager.set_hook([&](std::int64_t, const BlockManager::Tokens& prefix) {
            told += static_cast<std::int64_t>(prefix.size()) % size == 0;
        });
        std::vector<std::int64_t> names;
        std::vector<BlockManager::Tokens> texts;
        for (int i = 0; i < 20000; ++i) {
            std::int64_t which = names.empty() ? 0 : draw(static_cast<std::int64_t>(names.size())), action = draw(12);
            BlockManager::Tokens tokens;
            for (std::int64_t n = draw(4 * size); n > 0; --n) tokens.push_back(draw(2));
            try {
                if (names.empty() || action == 0) {
                    names.push_back(next);
                    texts.emplace_back(tokens.begin(), tokens.begin() + manager.allocate(next++, tokens));
                } else if (action == 1) {
                    manager.fork(names[which], next);
                    names.push_back(next++);
                    texts.push_back(BlockManager::Tokens(texts[which]));
                } else if (action < (manager.available() < 3 ? 8 : 3)) {
                    manager.free(names[which]);
                    names.erase(names.begin() + which);
                    texts.erase(texts.begin() + which);
                } else if (action == 8) {
                    texts[which].resize(draw(static_cast<std::int64_t>(texts[which].size()) + 1));
                    manager.truncate(names[which], static_cast<std::int64_t>(texts[which].size()));
                } else {
                    manager.append(names[which], tokens);
                    texts[which].insert(texts[which].end(), tokens.begin(), tokens.end());
                }
            } catch (const CacheFull&) {
                ++full;
            }
            if (i % 50 == 0) {
                manager.check();
                for (std::size_t n = 0; n < names.size(); ++n)
                    if (manager.tokens(names[n]) != texts[n]) return std::printf("contents differ, seed %u\n", seed), 1;
            }
        }
        bool caches = seed % 4 != 3;
        std::int64_t evictions = manager.statistics().evictions;
        if (!full || told > evictions || (told > 0) != caches || (evictions > 0) != caches) {
            std::printf("seed %u: %lld evictions, the hook heard of %lld; %lld times full\n", seed,
                        static_cast<long long>(evictions), static_cast<long long>(told), static_cast<long long>(full));
            return 1;
        }
    }
    return 0;
}
