// Search a built site as the browser does: node tools/search.js SITE < queries (one a line); a line of JSON for each:
// the addresses of the pages that are found, best first. Runs the search worker of the site itself.
const fs = require('fs'), path = require('path')
const site = process.argv[2]
const workers = path.join(site, 'assets', 'javascripts', 'workers')
const worker = fs.readdirSync(workers).find(o => o.startsWith('search'))
const queries = fs.readFileSync(0, 'utf8').split('\n').filter(o => o.trim())
const filter = { input: { type: 'operator', data: { operator: 'and', operands: [] } },
                 aggregation: { input: [{ type: 'term', data: { field: 'tags' } }] } }
const index = JSON.parse(fs.readFileSync(path.join(site, 'search.json'), 'utf8'))
let next = 0
function ask() {
  const data = structuredClone({ input: queries[next], filter }) // as a message is copied; the worker changes it
  if (next < queries.length) self.onmessage({ data: { type: 2, data } })
}
global.self = {
  postMessage(message) {
    if (message.type === 4) throw new Error('the search failed')
    if (message.type === 3) {
      const pages = message.data.items.map(o => index.items[o.id].location.split('#')[0])
      console.log(JSON.stringify([...new Set(pages)]))
      next++
    }
    ask()
  }
}
require('vm').runInThisContext(fs.readFileSync(path.join(workers, worker), 'utf8'))
self.onmessage({ data: { type: 0, data: index } })
