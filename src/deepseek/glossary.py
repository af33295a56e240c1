"""What is spoken of in a domain, in English and Chinese: prior knowledge of those who have no text of it yet.

For each domain the words that name it, and words that an expert of it uses and others seldom do. They were listed from
knowledge of the domains alone, before any text that benchmarks ask with was looked at. Words are separated by |.
"""

from __future__ import annotations

from typing import NamedTuple


class Domain(NamedTuple):
    """names: of the domain itself and who works in it. english, chinese: words of those who speak about it."""

    names: str
    english: str
    chinese: str


GLOSSARY: dict[str, Domain] = {
    "text_expert": Domain(
        names="literature|literary|writing|essay|essays|novel|novels|fiction|poetry|encyclopedia|encyclopaedia|"
              "history|biography|biographies|文学|写作|作文|散文|小说|诗歌|诗词|文章|百科|历史|传记",
        english="chapter|preface|volume|novelist|poem|poet|sonnet|haiku|limerick|stanza|rhyme|narrator|narrative|story|"
                "plot|protagonist|character|metaphor|simile|author|paragraph|headline|slogan|blog post|press release|"
                "cover letter|speech|toast|eulogy|memoir|diary|article|newspaper|editorial|review|synopsis|"
                "screenplay|script|playwright|drama|tragedy|comedy|fairy tale|fable|legend|myth|mythology|folklore|"
                "proofread|rewrite|rephrase|paraphrase|tone|draft|title|caption|once upon a time|said he|said she|"
                "historian|historical|ancient|medieval|century|empire|emperor|dynasty|kingdom|king|queen|revolution|"
                "war|battle|treaty|colony|civilization|archaeology|renaissance|geography|continent|ocean|river|"
                "mountain|island|desert|capital city|population|culture|religion|philosophy|philosopher|painter|"
                "painting|sculpture|museum|architecture|composer|symphony|opera|orchestra|film director|actor|"
                "species|planet|galaxy|astronomy|dinosaur|born|famous",
        chinese="序言|章回|作家|作者|诗人|一首诗|绝句|律诗|词牌|宋词|唐诗|古诗|诗句|押韵|对联|曰：|之曰|文言文|古文|翻译成白话|"
                "故事|童话|寓言|神话|传说|民间|情节|主人公|人物|叙述|描写|比喻|拟人|修辞|抒情|议论文|记叙文|读后感|观后感|"
                "日记|书信|演讲稿|发言稿|致辞|祝福语|贺词|悼词|新闻稿|通讯稿|文案|标语|口号|标题|开头|结尾|段落|润色|改写|"
                "扩写|缩写|续写|仿写|语气|措辞|初稿|剧本|戏剧|悲剧|喜剧|名著|红楼梦|西游记|三国|水浒|鲁迅|李白|杜甫|苏轼|"
                "史书|朝代|皇帝|帝国|王朝|古代|近代|世纪|战争|战役|革命|条约|变法|起义|文明|考古|文物|地理|大陆|海洋|河流|"
                "长江|黄河|山脉|岛屿|沙漠|首都|人口|民族|文化|宗教|哲学|哲学家|画家|绘画|雕塑|书法|博物馆|建筑|作曲家|交响乐|"
                "京剧|导演|演员|物种|行星|银河|天文|恐龙|出生于"),
    "code_expert": Domain(
        names="code|coding|programming|programmer|programmers|software|developer|developers|"
              "编程|代码|软件|程序员|程序设计|开发者",
        english="program|programs|compiler|compile|interpreter|runtime|stdout|stdin|stderr|debug|debugger|bug|traceback|exception|"
                "stack trace|segfault|null pointer|pointer|python|javascript|typescript|java|rust|golang|kotlin|swift|"
                "php|ruby|perl|haskell|html|css|sql|bash|shell|linux|docker|kubernetes|git|github|commit|branch|merge|"
                "repository|pull request|api|rest|endpoint|http|json|yaml|xml|csv|regex|regular expression|algorithm|"
                "recursion|recursive|iterator|loop|array|linked list|hash map|hashmap|dictionary|tuple|queue|stack|"
                "binary tree|binary search|sort|string|substring|boolean|lambda|closure|decorator|class|method|"
                "constructor|inheritance|polymorphism|interface|struct|enum|variable|constant|function|argument|"
                "parameter|return|import|module|package|library|framework|dependency|npm|pip|unit test|pytest|mock|"
                "refactor|thread|mutex|deadlock|async|await|concurrency|coroutine|database|query|select|index|"
                "schema|transaction|cache|redis|server|client|backend|frontend|react|vue|django|flask|numpy|pandas|"
                "pytorch|parser|token|syntax|typeerror|keyerror|overflow|memory leak|garbage collection|bitwise|"
                "deployment|script|snippet|callback|socket|encoding|utf|float|integer overflow",
        chinese="程序|函数|变量|常量|数组|链表|列表|字典|哈希|队列|二叉树|递归|循环|遍历|迭代|算法|排序|二分查找|时间复杂度|空间复杂度|"
                "数据结构|字符串|子串|正则|正则表达式|布尔|整型|浮点|类型|对象|类和|继承|多态|封装|接口|构造函数|参数|返回值|"
                "实参|形参|指针|引用|内存|内存泄漏|垃圾回收|线程|多线程|进程|协程|并发|异步|死锁|加锁|编译|编译器|解释器|运行时|"
                "调试|断点|报错|异常|捕获|堆栈|崩溃|语法错误|单元测试|测试用例|重构|注释|脚本|命令行|终端|数据库|查询|索引|"
                "主键|外键|事务|缓存|服务器|客户端|后端|前端|网页|爬虫|框架|依赖|第三方库|模块|导入|安装包|部署|容器|镜像|"
                "版本控制|仓库|分支|合并|提交|回滚|请求|响应|端口|网络协议|套接字|序列化|解析|编码|乱码|日志|配置文件|环境变量|"
                "边界条件|输入输出|标准输出|读取文件|数据类型|运算符|位运算|伪代码|源码|开源|架构|微服务|设计模式|回调|闭包|"
                "装饰器|生成器|迭代器"),
    "math_expert": Domain(
        names="math|maths|mathematics|mathematical|mathematician|arithmetic|algebra|geometry|calculus|"
              "数学|算术|代数|几何|微积分|应用题|奥数",
        english="equation|inequality|quadratic|linear equation|theorem|lemma|proof|prove|conjecture|triangle|"
                "isosceles|hypotenuse|circle|radius|diameter|circumference|rectangle|square|square root|polygon|"
                "hexagon|cube|sphere|cylinder|cone|perimeter|area|volume|angle|degrees|radians|parallel|"
                "perpendicular|tangent|sine|cosine|logarithm|exponent|polynomial|factorize|factor|fraction|numerator|"
                "denominator|decimal|integer|prime|prime number|divisor|divisible|remainder|quotient|multiple|"
                "least common multiple|greatest common divisor|modulo|modular|sum|difference|product|multiply|divide|"
                "subtract|add|plus|minus|times|percent|percentage|ratio|proportion|average|mean|median|"
                "standard deviation|variance|probability|dice|coin|permutation|combination|combinatorics|factorial|"
                "sequence|arithmetic progression|geometric series|limit|converge|derivative|differentiate|integral|"
                "integrate|antiderivative|matrix|determinant|eigenvalue|vector|dot product|coordinates|slope|"
                "intercept|parabola|ellipse|graph of|axis|function f|domain and range|root|roots|solve for|"
                "simplify|how many|how much|calculate|compute|speed|miles|per hour|twice|half|altogether|left over|"
                "consecutive|digits|even|odd|real number|complex number|irrational|set theory|bijection|induction|"
                "\\frac|\\sqrt|\\times",
        chinese="方程|方程组|一元二次|不等式|定理|引理|证明|求证|求解|解方程|三角形|等腰|直角|斜边|圆形|半径|直径|圆周|"
                "长方形|正方形|平行四边形|梯形|多边形|立方体|正方体|长方体|圆柱|圆锥|球体|周长|面积|体积|表面积|角度|平行|"
                "垂直|切线|正弦|余弦|正切|三角函数|对数|指数|幂|多项式|因式分解|因数|公因数|公倍数|倍数|分数|分子|分母|通分|"
                "约分|小数|整数|自然数|有理数|无理数|实数|复数|质数|素数|合数|奇数|偶数|整除|余数|商|被除数|除数|加法|减法|"
                "乘法|除法|平方|立方|平方根|开方|之和|之差|乘积|百分之|百分比|比例|平均数|中位数|众数|方差|标准差|概率|骰子|"
                "硬币|排列|组合|阶乘|数列|等差|等比|通项|求和|极限|收敛|导数|求导|积分|不定积分|定积分|微分|矩阵|行列式|"
                "特征值|向量|内积|坐标|斜率|截距|抛物线|椭圆|双曲线|函数图像|单调|最大值|最小值|极值|零点|集合|归纳法|计算|"
                "等于多少|多少个|几个|一共|还剩|平均每|每小时|千米|速度|路程|相遇|追及|工程队|鸡兔同笼|化简|求值"),
    "law_expert": Domain(
        names="law|laws|legal|lawyer|lawyers|attorney|litigation|statute|statutes|legislation|jurisprudence|court|"
              "courts|judicial|法律|法学|法务|律师|司法|诉讼|法规|法院|刑法|民法|合同法|法条",
        english="plaintiff|defendant|appellant|respondent|prosecutor|prosecution|judge|jury|verdict|ruling|judgment|"
                "appeal|lawsuit|sue|trial|testimony|witness|subpoena|affidavit|evidence|hearsay|contract|agreement|"
                "clause|breach|damages|liability|liable|negligence|tort|indemnify|indemnity|warranty|arbitration|"
                "mediation|settlement|injunction|jurisdiction|venue|statute of limitations|constitution|"
                "constitutional|amendment|legislature|ordinance|regulation|compliance|felony|misdemeanor|crime|"
                "criminal|offence|offense|theft|fraud|assault|homicide|manslaughter|murder|bail|parole|probation|"
                "imprisonment|acquitted|guilty|plea|custody|divorce|alimony|guardian|inheritance|will and "
                "testament|probate|heir|trustee|landlord|tenant|lease|eviction|deposit|mortgage|easement|title deed|"
                "copyright|patent|trademark|infringement|licence|license|licensor|licensee|sublicense|"
                "confidentiality|nondisclosure|non-compete|employer|employee|dismissal|severance|discrimination|"
                "harassment|defamation|libel|slander|privacy|gdpr|consumer protection|unenforceable|void|voidable|"
                "null|force majeure|hereby|herein|thereof|whereas|pursuant|notwithstanding|party|parties|"
                "counterparty|obligation|rights|due process|habeas corpus|precedent|notary|power of attorney",
        chinese="原告|被告|被告人|当事人|上诉|起诉|应诉|反诉|再审|一审|二审|审判|法官|检察|检察院|公诉|庭审|开庭|证据|证人|"
                "举证|判决|裁定|裁判|调解|仲裁|强制执行|管辖|时效|立案|合同|协议|条款|违约|违约金|定金|赔偿|损害赔偿|"
                "侵权|责任|连带责任|过错|不可抗力|解除合同|无效|效力|撤销|履行|义务|权利|法定|刑事|民事|行政处罚|行政复议|"
                "犯罪|罪名|嫌疑人|有期徒刑|无期徒刑|拘役|缓刑|量刑|自首|立功|累犯|盗窃|诈骗|抢劫|故意伤害|故意杀人|正当防卫|"
                "取保候审|拘留|逮捕|婚姻|离婚|抚养权|抚养费|赡养|监护|继承|遗嘱|遗产|夫妻共同财产|彩礼|房东|租客|租赁|"
                "租房合同|押金|物业|产权|过户|抵押|担保|债务|债权|借条|欠条|劳动合同|劳动法|劳动仲裁|工伤|辞退|解雇|"
                "经济补偿|加班费|竞业限制|保密协议|知识产权|著作权|版权|专利|商标|名誉权|隐私权|肖像权|消费者权益|交通事故|"
                "肇事|醉驾|宪法|法案|条例|规定|司法解释|第一条|民法典|公司法|维权|报警|派出所|公证|授权委托"),
    "finance_expert": Domain(
        names="finance|financial|economics|economy|economic|accounting|accountant|investment|investing|banking|audit|"
              "auditing|tax|taxes|taxation|金融|财经|财务|经济|会计|审计|投资|银行|税务|税收|理财|证券",
        english="revenue|net income|gross margin|profit|loss|earnings|ebitda|dividend|shareholder|stockholder|fiscal|"
                "asset|assets|liabilities|equity|balance sheet|income statement|cash flow|bond|yield|coupon|maturity|"
                "treasury|interest rate|compound interest|apr|principal|loan|credit|credit card|debt|mortgage rate|"
                "refinance|collateral|default|bank|savings account|deposit rate|central bank|federal reserve|"
                "monetary|inflation|deflation|recession|gdp|unemployment|supply and demand|elasticity|monopoly|"
                "oligopoly|market|markets|stock|stocks|share price|index fund|etf|mutual fund|hedge fund|portfolio|"
                "diversification|diversify|volatility|risk premium|beta|sharpe|derivative contract|option|futures|"
                "hedge|swap|currency|exchange rate|dollar|euro|yuan|invoice|receivable|payable|ledger|bookkeeping|"
                "depreciation|amortization|goodwill|inventory|accrual|accrued|gaap|ifrs|budget|forecast|valuation|"
                "discounted|net present value|rate of return|roi|payback|capital gains|capital|income tax|deduction|"
                "withholding|vat|tariff|subsidy|export|import duty|trade deficit|pension|retirement|insurance|premium|"
                "annuity|ipo|venture capital|startup funding|acquisition|merger|private equity|leverage|leveraged|"
                "margin|liquidity|solvency|bankruptcy|crypto|bitcoin|broker|trader|bull market|bear market|pe ratio|"
                "price|pricing|cost|costs|wage|consumer price",
        chinese="股票|股市|股价|大盘|股东|股权|分红|派息|基金|指数基金|定投|债券|国债|收益率|票息|到期|利率|利息|复利|"
                "年化|本金|贷款|房贷|车贷|按揭|还款|等额本息|信用卡|分期|逾期|征信|存款|活期|定期存款|储蓄|央行|"
                "商业银行|货币政策|财政政策|降息|加息|准备金|通货膨胀|通胀|通缩|衰退|失业率|供给|需求|供求|价格弹性|垄断|"
                "市场|牛市|熊市|涨停|跌停|市盈率|市净率|市值|估值|投资组合|分散投资|风险|波动|对冲|期权|期货|杠杆|汇率|"
                "外汇|人民币|美元|贬值|升值|关税|出口|进口|贸易顺差|贸易逆差|财报|年报|营收|营业收入|成本|毛利|毛利率|净利润|"
                "利润|利润表|资产|负债|资产负债表|现金流|现金流量|所有者权益|应收账款|应付账款|存货|折旧|摊销|商誉|计提|"
                "记账|分录|借贷|凭证|发票|报销|预算|决算|成本核算|增值税|所得税|个税|个人所得税|纳税|避税|退税|补贴|养老金|"
                "社保|公积金|保险|保费|理赔|融资|上市|并购|收购|风险投资|创业板|破产|资金|资本|收益|亏损|回报率|净现值|"
                "理财产品|比特币|券商|手续费"),
    "medical_expert": Domain(
        names="medicine|medical|medicines|health|healthcare|clinical|clinic|doctor|doctors|physician|disease|diseases|"
              "pharmacy|nursing|nurse|hospital|医学|医疗|医药|健康|临床|医生|大夫|疾病|药学|护理|医院|卫生|中医",
        english="patient|patients|symptom|symptoms|treatment|treat|therapy|diagnosis|diagnose|prognosis|chronic|acute|"
                "syndrome|disorder|infection|inflammation|fever|cough|headache|migraine|nausea|vomiting|diarrhea|"
                "constipation|rash|itching|swelling|fatigue|dizziness|chest pain|sore throat|runny nose|pain|cold|"
                "flu|influenza|covid|pneumonia|asthma|bronchitis|allergy|allergic|diabetes|insulin|blood sugar|"
                "glucose|hypertension|blood pressure|cholesterol|heart attack|stroke|arrhythmia|cardiac|"
                "cardiovascular|kidney|liver|hepatitis|lung|stomach|ulcer|reflux|gout|arthritis|osteoporosis|"
                "fracture|sprain|cancer|tumor|tumour|chemotherapy|radiotherapy|biopsy|leukemia|anemia|thyroid|"
                "hormone|pregnancy|pregnant|menopause|menstrual|pediatric|infant|vaccine|vaccination|antibiotic|"
                "antibiotics|ibuprofen|aspirin|paracetamol|acetaminophen|metformin|statin|antidepressant|dose|dosage|"
                "mg|tablet|pill|prescription|prescribe|side effect|side effects|contraindication|overdose|surgery|"
                "surgical|anesthesia|transplant|wound|bleeding|blood|blood test|mri|ct scan|x-ray|ultrasound|"
                "virus|viral|bacteria|bacterial|immune|antibody|gene|genetic|inherited|mutation|randomized|cohort|"
                "placebo|mortality|depression|anxiety|insomnia|dementia|epilepsy|seizure|vitamin|nutrition|diet|"
                "obesity|emergency room",
        chinese="患者|病人|症状|治疗|诊断|确诊|病因|病情|预后|慢性|急性|综合征|感染|炎症|发炎|发烧|发热|高烧|退烧|咳嗽|头痛|"
                "头疼|头晕|恶心|呕吐|腹泻|拉肚子|便秘|腹痛|胃痛|肚子疼|皮疹|湿疹|瘙痒|水肿|乏力|胸闷|胸痛|心慌|喉咙痛|嗓子疼|"
                "流鼻涕|鼻塞|感冒|流感|新冠|肺炎|哮喘|支气管炎|过敏|糖尿病|胰岛素|血糖|高血压|血压|血脂|胆固醇|冠心病|心脏|"
                "心律|心梗|中风|脑梗|肾脏|肝脏|肝炎|脂肪肝|肺部|胃炎|胃溃疡|痛风|尿酸|关节炎|骨折|扭伤|骨质疏松|癌|癌症|肿瘤|"
                "化疗|放疗|白血病|贫血|甲状腺|激素|怀孕|孕妇|孕期|哺乳|月经|更年期|婴儿|小儿|儿科|内科|外科|妇科|疫苗|接种|"
                "抗生素|头孢|阿莫西林|布洛芬|阿司匹林|药物|吃药|服药|用药|药片|胶囊|剂量|毫克|处方|副作用|不良反应|禁忌|手术|"
                "麻醉|移植|伤口|出血|止血|化验|体检|血常规|核磁|彩超|病毒|细菌|免疫|抗体|基因|遗传|突变|随机对照|死亡率|抑郁|"
                "焦虑|失眠|痴呆|癫痫|维生素|营养|饮食|肥胖|减肥|急诊|挂号|住院|复查|针灸|中药|穴位"),
    "teaching_expert": Domain(
        names="teaching|teacher|teachers|education|educational|educator|pedagogy|tutor|tutoring|curriculum|classroom|"
              "教学|教育|教师|老师|师范|辅导|课堂|备课|课程|教案|教研",
        english="student|students|pupil|pupils|lesson|lesson plan|homework|worksheet|syllabus|quiz|exam|exams|"
                "midterm|exercise|exercises|grade|grades|grading|rubric|learning objective|learning objectives|"
                "learning outcomes|assessment|formative|summative|scaffold|scaffolding|differentiated instruction|"
                "instruction|instructional|textbook|coursework|course|lecture|lecturer|seminar|professor|school|"
                "elementary school|primary school|middle school|high school|kindergarten|preschool|college|"
                "university|undergraduate|semester|enrollment|tuition|scholarship|literacy|phonics|spelling|"
                "vocabulary|grammar|reading comprehension|comprehension|flashcard|flashcards|study plan|study guide|"
                "study|learn|learner|learners|teach|multiple choice|answer key|icebreaker|group work|peer review|"
                "classroom management|parent meeting|report card|field trip|montessori|bloom's taxonomy|whiteboard|"
                "assignment|assignments|mnemonic|revision|practice questions|beginners|explain to a child|"
                "special education|edtech|e-learning",
        chinese="学生|同学|小学|小学生|初中|初中生|高中|高中生|中学|中学生|大学|幼儿园|年级|班级|班主任|班会|家长会|家长|"
                "学校|校园|上课|下课|讲课|说课|听课|公开课|微课|网课|教材|课本|课文|课件|板书|教具|教学目标|教学重点|"
                "教学难点|教学设计|教学反思|教学方法|知识点|重点难点|导入环节|随堂|课后|作业|习题|练习|练习题|试题|试卷|"
                "出题|选择题|填空题|判断题|答案解析|考试|期中|期末|中考|高考|考研|测验|小测|评分|评语|成绩|学分|学期|"
                "大纲|教学大纲|学习目标|学习计划|学习方法|复习|预习|备考|背诵|默写|听写|单词|词汇|语法|拼音|识字|阅读理解|"
                "作文批改|批改|讲解|启发|引导|因材施教|分层教学|小组讨论|合作学习|探究|兴趣|素质教育|义务教育|留学|招生|"
                "录取|培训|讲座|导师|教授|学员|初学者|入门|思维导图|错题本|错题|口诀"),
    "dialogue_expert": Domain(
        names="dialogue|dialog|dialogues|conversation|conversations|chat|chatting|booking|bookings|reservation|"
              "reservations|customer service|small talk|对话|闲聊|聊天|会话|客服|预订|预约|订票|点餐",
        english="hello|hi there|hey|thanks|thank you|you're welcome|good morning|good evening|good night|goodbye|bye|"
                "nice to meet|how are you|anything else|would you like|can i help|may i help|sounds good|no problem|"
                "sorry|excuse me|okay|book|reserve|table for|restaurant|cafe|menu|dinner|lunch|breakfast|takeaway|"
                "takeout|order|pizza|burger|coffee|latte|drink|dessert|delivery|hotel|room|check-in|check-out|double "
                "room|suite|flight|flights|airline|airport|boarding|one-way|round trip|round-trip|luggage|train|"
                "train ticket|ticket|tickets|seat|seats|aisle|bus|taxi|cab|uber|ride|pick up|pick me up|rental car|"
                "appointment|reschedule|cancel|cancellation|confirm|confirmation|available|availability|tonight|"
                "tomorrow|this weekend|movie|movies|cinema|theater|showtimes|concert|playlist|song|music|weather|"
                "forecast for|alarm|remind me|reminder|call me|phone number|address|nearby|nearest|recommend|"
                "recommendation|sightseeing|attraction|tour|trip|itinerary|vacation|holiday|gift|birthday|party|"
                "hairdresser|salon|gym|refund|return policy|exchange an item|warranty claim|tracking number|parcel|"
                "shipping|package|complaint|representative|agent|membership|coupon|discount|chat with me|"
                "feeling lonely|joke",
        chinese="你好|您好|谢谢|多谢|再见|拜拜|早上好|晚上好|晚安|不客气|没关系|没问题|好的|请问|打扰|嗯|哈哈|是呀|是吗|好呀|"
                "还有什么|需要帮忙|为您服务|推荐一|推荐|订|帮我订|预定|订一个|订两|餐厅|饭店|餐馆|包间|靠窗|菜单|点菜|招牌菜|"
                "火锅|外卖|披萨|汉堡|咖啡|奶茶|饮料|晚餐|午餐|早餐|酒店|宾馆|民宿|房间|标间|大床房|入住|退房|机票|航班|"
                "机场|登机|单程|往返|行李|火车票|高铁|车票|座位|改签|退票|地铁|公交|打车|出租车|网约车|接我|租车|门票|景点|"
                "景区|旅游|旅行|行程|攻略|导游|附近|周边|最近的|怎么走|营业时间|电影|电影票|影院|演唱会|歌曲|音乐|播放|天气|"
                "明天|今晚|周末|闹钟|提醒我|电话|地址|取消|确认|改期|改到|有空|生日|礼物|聚会|健身房|理发|快递|物流|包裹|"
                "发货|退货|换货|退款|投诉|售后|人工客服|会员|优惠券|打折|陪我|无聊|开心|心情|笑话|讲个|喜欢吃|评分"),
}
