// What comes first in the search: pages that answer a question, then whole jobs, then single names, then all others
const places = [[/\/index$/, 5], [/^howto\//, 20], [/^index$/, 15], [/^tutorials\/(?!.*\.zh$)/, 10], [/^api\//, 0], [/./, -5]];
const place = page => places.find(([name]) => name.test(page))[1];

var Scorer = {
  score: ([page, , , , score]) => score + place(page),
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2};
